"""Tar files give the images, labels and order of the folder they were made from; hostile ones are one
sentence."""
import io
import os
import shutil
import subprocess
import tarfile

import pytest

from datasets.index import IndexCache, Source
from datasets.readers import open_reader
from datasets.tars import members
from tests.kits.errors import refused


def read(root):
    return open_reader(Source.of(str(root)), IndexCache("/dev/null/none"))


def member(name=b"a/1.jpg", size=0, kind=b"0", content=b"", raw_size=None) -> bytes:
    """A tar member with any header: `raw_size` are the twelve bytes of its size field."""
    field = raw_size or b"%011o\0" % size
    block = bytearray(512)
    block[:len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", field, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % 512)


END = bytes(1024)
IMAGE = member(size=4, content=b"data")
HOSTILE = {
    "no tar": b"no tar at all" * 99, "empty": b"", "cut in a header": IMAGE[:200], "cut in the data": IMAGE[:514],
    "without an end": IMAGE, "a damaged header": IMAGE + b"x" + IMAGE[1:] + END,
    "a negative size": member(raw_size=b"\xff" * 11 + b"\x9c") + END, "a size of terabytes": member(size=8 ** 11 - 1) + END,
    "a PAX header of gigabytes": member(kind=b"x", size=8 ** 10) + END,
    "a long PAX header": member(kind=b"x", size=2 << 20, content=b"9 a=" + bytes(2 << 20)) + IMAGE + END,
    "a long link": member(kind=b"K", size=2 << 20, content=b"a" * (2 << 20)) + IMAGE + END,
    "chained headers": member(kind=b"L", size=4, content=b"name") * 2000 + IMAGE + END,
    "PAX records that stand still": member(kind=b"x", size=5, content=b"0 a=b") + IMAGE + END,
    "a PAX size below 0": member(kind=b"x", size=12, content=b"12 size=-99\n") + IMAGE + END}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_tar_is_one_sentence(tmp_path, kind):
    (tmp_path / "a.tar").write_bytes(HOSTILE[kind])
    with refused("unreadable_data", f"{tmp_path}/a.tar"):
        read(tmp_path)


def test_a_dangling_link_or_a_fifo_is_no_tar_and_one_without_images_says_so(tmp_path):
    for make in (lambda path: path.symlink_to("nowhere"), os.mkfifo):
        make(tmp_path / "a.tar")
        with refused("unreadable_data"):
            read(tmp_path)
        (tmp_path / "a.tar").unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(__file__, "class/words.txt")
    with refused("missing_data"):
        read(tmp_path)


def test_what_is_no_image_is_counted_and_long_names_of_every_kind_are_read(tmp_path):
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        long = "/".join(["folder" * 10] * 3) + f"/class/ü{number}.jpg"
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as tar:
            for name in (long, "class/x.txt", "class/._y.jpg", ".hidden/z.jpg"):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                info = tarfile.TarInfo("class/other.jpg")
                info.type, info.linkname = kind, "l" * (300 if number else 90)
                tar.addfile(info)
    (tmp_path / "class").mkdir()
    reader = read(tmp_path)
    assert reader.classes == ["class"] and len(reader) == 3 and reader.name(1).endswith("class/ü1.jpg")
    assert all(reader.encoded(i) == b"abc" for i in range(3))
    assert reader.left_out == {".txt": 3, "links and other special members": 9,
                               "folders beside the tar files": 1}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar program")
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_passed_over_and_what_follows_is_found(tmp_path, form):
    with open(tmp_path / "a.jpg", "wb") as file:
        for number in range(40):
            file.seek(number << 18)
            file.write(b"x" * 4096)
    (tmp_path / "b.jpg").write_bytes(b"abc")
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", "x.tar", "a.jpg", "b.jpg"], cwd=tmp_path, check=True)
    (_, sparse), (_, plain) = members(str(tmp_path / "x.tar"))
    assert sparse.issparse() and (tmp_path / "x.tar").read_bytes()[plain.offset_data:plain.offset_data + 3] == b"abc"
