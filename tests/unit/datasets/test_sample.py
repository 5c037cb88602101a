"""The embedded digits: the same files each time, whole or not there."""
import hashlib
from concurrent.futures import ThreadPoolExecutor

from datasets.build import build_data
from datasets.sample import ensure_sample
from tests.kits.errors import refused
from tests.kits.options import data_options


def _digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    return len(files), hashlib.sha256(content).hexdigest()


def test_the_digits_have_a_fixed_split_and_are_written_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ensure_sample, [tmp_path / "one"] * 3))
    ensure_sample(tmp_path / "two")
    assert _digest(tmp_path / "one") == _digest(tmp_path / "two") and _digest(tmp_path / "one")[0] == 1797
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"one", "two"}
    data = build_data(data_options(data_path=str(tmp_path / "one")), train=True, evaluate=True)
    assert (len(data.train), len(data.val), data.num_classes) == (1437, 360, 10)
    held_back = {path.name.split("_")[1] for path in (tmp_path / "one" / "val").rglob("*.JPEG")}
    assert not held_back & {path.name.split("_")[1] for path in (tmp_path / "one" / "train").rglob("*.JPEG")}


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for path in (tmp_path / "mine", tmp_path / "file" / "x"):
        with refused("unwritable_folder", path):
            ensure_sample(path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
