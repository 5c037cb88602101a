"""tools.data: what it says on data, what it packs, what it finds broken."""
import json
import os
import shutil
import tarfile

import pytest

from datasets import pack as packing
from datasets.images import decode
from datasets.index import Rows
from tests.kits.forms import read
from tests.kits.images import jpeg
from tools.data import main


@pytest.fixture
def folders(tmp_path):
    """Two classes with odd names: dots, ties between extensions, bytes that are not UTF-8, a folder below."""
    names = ("a.b/x.jpg", "a.b/x.png", "a.b/x.y.JPEG", "a.b/ü 1.jpg", "a.b/100%.jpg", "a.b/sub/z.jpg", "c/x.jpg", b"c/\xe9.jpg")
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path), b"in", b"train", os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(jpeg(number, (40, 36 + number)))
    return tmp_path / "in"


def run(*words):
    return main([str(word) for word in words] + ["--index_cache", "/dev/null/none"])


def content(reader):
    return {(reader.classes[reader.labels[i]], reader.stem(i), reader.encoded(i)) for i in range(len(reader))}


def test_pack_keeps_every_byte_name_and_the_order(folders, tmp_path, capsys):
    assert run("pack", folders, tmp_path / "out", "--tar_gb", "0.00002") == 0
    assert "as before" in capsys.readouterr().out
    for order in (None, ""):  # the canonical one, and that of earlier checkpoints
        plain, packed = (read(path, order=order) for path in (folders / "train", tmp_path / "out"))
        assert packed.order == plain.order and packed.classes == plain.classes and content(packed) == content(plain)
    info = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]
    assert sum(info["shard_lengths"]) == 8 and len(info["filenames"]) > 1 and len(info["sha256"][0]) == 64
    for name in info["filenames"]:  # as other readers group them: the key ends at the first dot of the last part
        with tarfile.open(tmp_path / "out" / name) as tar:
            keys = [member.name.rpartition("/")[2].partition(".")[0] for member in tar]
        assert keys == [key for key in keys[::3] for _ in range(3)]


def test_the_packed_index_is_used_where_it_was_copied_and_not_once_a_tar_changes(folders, tmp_path, monkeypatch):
    run("pack", folders, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "_train.index")
    monkeypatch.setattr(Rows, "index", lambda *_, **__: pytest.fail("scanned"))
    assert len(content(read(tmp_path / "copy"))) == 8
    os.utime(tmp_path / "copy" / "train-00000.tar", (2 ** 31, 2 ** 31))
    with pytest.raises(pytest.fail.Exception):
        read(tmp_path / "copy")


def test_pack_stops_and_resumes_and_other_images_are_refused(folders, tmp_path, monkeypatch):
    small = ("--tar_gb", "0.000003")
    run("pack", folders, tmp_path / "whole", *small)
    fill, calls = packing._fill, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fill(*arguments)
    monkeypatch.setattr(packing, "_fill", stop)
    assert [run("pack", folders, tmp_path / "out", *small) for _ in range(2)] == [130, 0]
    whole, resumed = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("whole", "out"))
    assert len(whole) > 3 and whole == resumed
    os.remove(folders / "train" / "c" / "x.jpg")
    assert run("pack", folders, tmp_path / "out", *small) == 2
    assert run("pack", folders, folders) == 2 == run("pack", folders)  # beside other files; without a folder


def test_pack_makes_smaller_images_only_when_asked_and_says_so(folders, tmp_path, capsys):
    assert run("pack", folders, tmp_path / "out", "--resize", "20") == 0
    assert "pixels have changed" in capsys.readouterr().out
    reader = read(tmp_path / "out")
    assert {min(decode(reader.encoded(i)).size) for i in range(8)} == {20}


def test_info_and_check_report_what_is_broken(folders, tmp_path, capsys):
    assert run("info", folders) == run("check", folders) == 0
    out = capsys.readouterr().out
    assert "train: 8 images in 2 classes (2 to 6 each), class folders, order" in out and "8 images, 0 unreadable" in out
    (folders / "train" / "c" / "x.jpg").write_bytes(b"no image")
    (folders / "train" / "c" / "x.txt").touch()
    assert run("check", folders / "train") == 1 and run("info", folders) == 0
    found = capsys.readouterr()
    assert "c/x.jpg" in found.err and "1 .txt" in found.out and "8 images, 1 unreadable" in found.out
    assert run("info", tmp_path / "nowhere") == 2
