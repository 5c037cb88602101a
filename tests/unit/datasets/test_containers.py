"""Hostile and broken containers are one sentence; what is odd but whole is read."""
import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile

import pytest

from datasets.build import build_data
from datasets.tars import members
from tests.kits.errors import refused
from tests.kits.forms import devkit, read, tar_bytes, write_tar
from tests.kits.images import jpeg
from tests.kits.options import data_options


def member(name=b"a/1.jpg", size=0, kind=b"0", content=b"", raw_size=None) -> bytes:
    """A tar member with any header: `raw_size` are the twelve bytes of its size field."""
    block = bytearray(512)
    block[:len(name)], block[100:108], block[156:157], block[257:265] = name, b"0000644\0", kind, b"ustar\x0000"
    block[124:136], block[148:156] = raw_size or b"%011o\0" % size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % 512)


def sample(key, label=b"0", image=b"jpeg", **more):
    return [(f"{key}.{kind}", data) for kind, data in {"jpg": image, "cls": label, **more}.items() if data is not None]


END, IMAGE, PLAIN = bytes(1024), member(size=4, content=b"data"), tar_bytes([("cat/a.jpg", b"x")])
TARS = {
    "no tar": b"no tar at all" * 99, "empty": b"", "cut in a header": IMAGE[:200], "cut in the data": IMAGE[:514],
    "without an end": IMAGE, "a damaged header": IMAGE + b"x" + IMAGE[1:] + END,
    "a negative size": member(raw_size=b"\xff" * 11 + b"\x9c") + END, "a size of terabytes": member(size=8 ** 11 - 1) + END,
    "a PAX header of gigabytes": member(kind=b"x", size=8 ** 10) + END,
    "a long PAX header": member(kind=b"x", size=2 << 20, content=b"9 a=" + bytes(2 << 20)) + IMAGE + END,
    "a long link": member(kind=b"K", size=2 << 20, content=b"a" * (2 << 20)) + IMAGE + END,
    "chained headers": member(kind=b"L", size=4, content=b"name") * 2000 + IMAGE + END,
    "PAX records that stand still": member(kind=b"x", size=5, content=b"0 a=b") + IMAGE + END,
    "a PAX size below 0": member(kind=b"x", size=12, content=b"12 size=-99\n") + IMAGE + END}
SAMPLES = {
    "no label": [*sample("a"), ("b.jpg", b"jpeg")], "a label that is no number": sample("a", b"cat"), "label -1": sample("a", b"-1"),
    "a huge label": sample("a", b"9" * 30), "broken JSON": sample("a", json=b"{"), "twice": sample("a") + sample("b") + sample("a"),
    "a member twice": sample("a") + [("a.jpg", b"x")], "mixed with plain tars": [*sample("a"), ("cat/b.jpg", b"x")],
    "a .cls of megabytes": sample("a", b"1" * (2 << 20)), "surrogates": sample("a", None, json=b'{"label": 0, "filename": "c/\\ud800.jpg"}'),
    "a list": sample("a", None, json=b"[1]")}
LISTS = [{}, {"filenames": 7}, {"filenames": ["0.tar", "1.tar"]}, {"filenames": ["0.tar"], "shard_lengths": [2]},
         {"filenames": []}, {"filenames": ["0.tar"], "shard_lengths": [1, 1]}]
BROKEN = [
    *(("unreadable_data", "0.tar", {"0.tar": data}) for data in TARS.values()),
    *(("unreadable_data invalid_labels duplicate_names", "", {"0.tar": tar_bytes(rows)}) for rows in SAMPLES.values()),
    *(("unreadable_data", "_info.json", {"0.tar": tar_bytes(sample("a")), "_info.json": json.dumps(info).encode()})
      for info in ({}, *({"splits": {"train": split}} for split in LISTS))),
    ("mixed_forms", "", {"0.tar": PLAIN, "1.tar": tar_bytes(sample("a"))}),
    ("mixed_forms", "parquet", {"0.tar": PLAIN, "0.parquet": b""}),
    ("mixed_forms", "dog", {"0.tar": PLAIN, "dog/b.jpg": b""}),
    ("duplicate_names", "cat/a.jpg", {"0.tar": PLAIN, "1.tar": PLAIN}),
    ("missing_data", "", {"0.tar": tar_bytes([("class/words.txt", b"x")])})]


@pytest.mark.parametrize("code, named, files", BROKEN, ids=[*TARS, *SAMPLES, *map(str, range(len(BROKEN) - len(TARS) - len(SAMPLES)))])
def test_a_hostile_or_broken_container_is_one_sentence(tmp_path, code, named, files):
    for name, data in files.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(data)
    with refused(code, f"{tmp_path}/train", named):
        read(tmp_path / "train")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), os.mkfifo])
def test_a_dangling_link_or_a_fifo_is_no_tar(tmp_path, make):
    make(tmp_path / "a.tar")
    with refused("unreadable_data", "a.tar"):
        read(tmp_path)


def varint(number: int) -> bytes:
    """A count as a parquet footer holds it."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


@pytest.mark.parametrize("damage", ["footer", "truncated", "pages", "columns", "text", "no labels", "label -1", *(
    f"terabytes: {count}" for count in ("rows", "rows of a group", "bytes", "bytes unpacked"))])
def test_broken_parquet_is_one_sentence_without_much_memory(tmp_path, damage):
    import pyarrow
    from pyarrow import parquet
    path, images = tmp_path / "0.parquet", [{"bytes": jpeg(i), "path": f"{i}.JPEG"} for i in range(200)]
    columns = {"image" if damage != "columns" else "other": images, "label": [0, 1] * 100 if damage != "label -1" else [-1] * 200}
    if damage == "no labels":
        del columns["label"]
    parquet.write_table(pyarrow.table(columns), path, row_group_size=150)
    data = bytearray(path.read_bytes())
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if damage == "footer":
        data[-8:-4] = (2 ** 31 - 1).to_bytes(4, "little")
    elif damage == "pages":  # what the footer says about sizes: every varint of it larger
        data[at:-8] = bytes(255 if byte > 127 else byte for byte in data[at:-8])
    elif damage.startswith("terabytes"):  # a well-formed footer in which one count is another
        group = parquet.read_metadata(path).row_group(0)
        claims = {"rows": 200, "rows of a group": 150, "bytes": group.column(0).total_compressed_size,
                  "bytes unpacked": group.column(0).total_uncompressed_size}
        footer = data[at:-8].replace(varint(2 * claims[damage[11:]]), varint(2 << 40))
        assert len(footer) > len(data) - 8 - at
        data[at:] = footer + len(footer).to_bytes(4, "little") + b"PAR1"
    path.write_bytes({"truncated": bytes(data[:len(data) // 2]), "text": b"PAR1 no parquet"}.get(damage, bytes(data)))
    with refused("unreadable_data invalid_labels", tmp_path):
        read(tmp_path)
    assert pyarrow.default_memory_pool().max_memory() < 50e6


def test_the_originals_need_a_devkit_that_fits(tmp_path):
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{i:08}.JPEG", jpeg(i)) for i in (1, 2)])
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"

    def refuses(code, *named):
        with refused(code, *named):
            build_data(data_options(data_set="IMNET", data_path=str(tmp_path)), train=False, evaluate=True)

    refuses("no_class_folders", "--val_labels")
    devkit(path, ["n01440764"], ["n01440764"])
    refuses("unreadable_data", path, "1 labels for 2 images")
    for damaged in (path.read_bytes()[:60] + bytes(9), gzip.compress(bytes(300 << 20), 1)):
        path.write_bytes(damaged)
        refuses("unreadable_data", path)


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
    assert reader.left_out == {".txt": 3, "links and other special members": 9, "folders beside the tar files": 1}


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
