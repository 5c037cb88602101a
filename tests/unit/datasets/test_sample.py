"""The embedded digits: whole or not there, with a fixed split."""
from concurrent.futures import ThreadPoolExecutor

from datasets.build import build_data
from datasets.sample import ensure_sample
from tests.kits.errors import refused
from tests.kits.options import data_options


def test_the_digits_have_a_fixed_split_and_are_written_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ensure_sample, [tmp_path / "one"] * 3))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["one"]
    data = build_data(data_options(data_path=str(tmp_path / "one")), train=True, evaluate=True)
    assert (len(data.train), len(data.val), data.num_classes) == (1437, 360, 10)
    assert (data.train.order[:8], data.val.order[:8]) == ("807fe38d", "6b39df42")  # names with their numbers


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex" / "x"):
        with refused("unwritable_folder", path):
            ensure_sample(path)
    assert [path.name for path in tmp_path.glob("*/*")] == ["thesis.tex"]
