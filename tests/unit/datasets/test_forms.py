"""The same images in every form: the same order, digest, labels and bytes, and so the same batches."""
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from common.errors import Failure
from common.synsets import imagenet_synsets
from datasets.build import build_data, eval_loader
from datasets.dataset import make_loader
from datasets.images import BadImage, decode, retried
from datasets.index import IndexCache
from datasets.readers import open_reader, source_of
from tests.kits.errors import refused
from tests.kits.forms import FORMS, devkit, read_tree, write_all, write_tar
from tests.kits.images import jpeg
from tests.kits.options import data_options

CLASSES = [imagenet_synsets()[i] for i in (0, 5, 417, 999)]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """60 + 20 JPEGs of four of ImageNet's classes in every form."""
    root = tmp_path_factory.mktemp("forms")
    for number in range(80):
        part, name = ("val" if number % 4 == 3 else "train"), CLASSES[number // 4 % 4]
        file = f"{name}_{number * 31}.JPEG" if part == "train" else f"ILSVRC2012_val_{number:08}.JPEG"
        (root / "tree" / part / name).mkdir(parents=True, exist_ok=True)
        (root / "tree" / part / name / file).write_bytes(jpeg(number, (40 + number, 36)))
    return write_all(root, read_tree(root / "tree"))


def options(path, **changes):
    return data_options(data_set="IMNET", data_path=str(path), allow_slow_parquet=True, **changes)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_in_the_same_order(forms, form):
    plain, other = (build_data(options(forms[name]), train=True, evaluate=True) for name in ("folders", form))
    for part in ("train", "val"):
        a, b = getattr(plain, part), getattr(other, part)
        assert a.order == b.order and len(a.order) == 32 and np.array_equal(a.targets, b.targets)
        assert a.reader.classes == b.reader.classes == CLASSES
        assert [a.reader.stem(i) for i in range(len(a))] == [b.reader.stem(i) for i in range(len(b))]
        assert [a.reader.encoded(i) for i in range(len(a))] == [b.reader.encoded(i) for i in range(len(b))]
        assert not b.reader.left_out
    assert plain.class_names == other.class_names


@pytest.mark.parametrize("world", [1, 3])
def test_parquet_is_evaluated_in_its_own_order_and_once_over_all_ranks(forms, world):
    data = build_data(options(forms["parquet"]), train=False, evaluate=True)
    seen = [i for rank in range(world) for batch in eval_loader(data, options(forms["parquet"]), rank, world)
            for i in batch.indices.tolist()]
    reader = data.val.reader
    assert sorted(seen) == list(range(20)) and seen != sorted(seen)
    assert [(reader.container(i), reader.offsets[i]) for i in seen] == sorted((reader.container(i), reader.offsets[i]) for i in seen)


def test_training_from_parquet_is_refused_with_the_command_that_helps(forms):
    with refused("slow_form", "tools.data pack", "--allow_slow_parquet"):
        build_data(data_options(data_set="IMNET", data_path=str(forms["parquet"])), train=True, evaluate=False)


def read(root, part="train"):
    return open_reader(source_of(str(root), part), IndexCache("/dev/null/none"))


def sample(key, label=b"0", image=b"jpeg", **more):
    return [(f"{key}.{kind}", data) for kind, data in {"jpg": image, "cls": label, **more}.items() if data is not None]


def test_webdataset_classes_without_names_are_synsets_when_there_are_1000_and_numbers_otherwise(tmp_path):
    for count, classes in ((1000, list(imagenet_synsets())), (12, [f"{i:02}" for i in range(12)])):
        write_tar(tmp_path / str(count) / "0.tar", [m for i in range(count) for m in sample(f"s{i}", str(i).encode())])
        reader = read(tmp_path / str(count))
        assert reader.classes == classes and reader.labels.tolist() == list(range(count))


def test_parquet_without_pyarrow_is_one_sentence(forms, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("missing_package", "pip install pyarrow"):
        read(forms["parquet"] / "data")


def test_parquet_names_come_from_its_metadata_and_gzipped_and_misnamed_images_are_read(tmp_path):
    tree = {"train": [("cat", "a.png", jpeg(0)), ("dog", "b.JPEG", gzip.compress(jpeg(1))), ("dog", "c.JPEG", jpeg(2))]}
    FORMS["parquet"](tmp_path, tree)
    reader = read(tmp_path / "data")
    assert reader.classes == ["text cat", "text dog"] and reader.form == "parquet (2 files)"
    assert [decode(reader.encoded(i)).size for i in range(3)] == [(40, 36)] * 3


WDS = {
    "no label": [*sample("a"), ("b.jpg", b"jpeg")], "a label that is no number": sample("a", b"cat"), "label -1": sample("a", b"-1"),
    "a huge label": sample("a", b"9" * 30), "broken JSON": sample("a", json=b"{"), "twice": sample("a") + sample("b") + sample("a"),
    "a member twice": sample("a") + [("a.jpg", b"x")], "mixed with plain tars": [*sample("a"), ("cat/b.jpg", b"x")],
    "a .cls of megabytes": sample("a", b"1" * (2 << 20)), "surrogates": sample("a", None, json=b'{"label": 0, "filename": "c/\\ud800.jpg"}'),
    "a list": sample("a", None, json=b"[1]")}


@pytest.mark.parametrize("kind", WDS)
def test_a_broken_webdataset_is_one_sentence(tmp_path, kind):
    write_tar(tmp_path / "0.tar", WDS[kind])
    with refused("unreadable_data invalid_labels duplicate_names", tmp_path):
        read(tmp_path)


@pytest.mark.parametrize("info", [
    {}, {"splits": {"train": {"filenames": 7}}}, {"splits": {"train": {"filenames": ["0.tar", "1.tar"]}}},
    {"splits": {"train": {"filenames": ["0.tar"], "shard_lengths": [2]}}}, {"splits": {"train": {"filenames": []}}},
    {"splits": {"train": {"filenames": ["0.tar"], "shard_lengths": [1, 1]}}}])
def test_a_list_of_tars_that_disagrees_with_the_files_is_one_sentence(tmp_path, info):
    write_tar(tmp_path / "train" / "0.tar", sample("a"))
    (tmp_path / "train" / "_info.json").write_text(json.dumps(info))
    with refused("unreadable_data", "_info.json"):
        read(tmp_path / "train")


def test_two_forms_in_one_folder_are_refused(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", [("cat/a.jpg", b"x")])
    write_tar(tmp_path / "a" / "1.tar", sample("a"))
    write_tar(tmp_path / "b" / "0.tar", [("cat/a.jpg", b"x")])
    (tmp_path / "b" / "0.parquet").touch()
    write_tar(tmp_path / "c" / "0.tar", [("cat/a.jpg", b"x")])
    (tmp_path / "c" / "dog").mkdir()
    (tmp_path / "c" / "dog" / "b.jpg").touch()
    for name in "abc":
        with refused("mixed_forms", tmp_path / name):
            read(tmp_path / name)


def test_an_image_that_is_there_twice_is_refused(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("cat/a.jpg", b"x")])
    with refused("duplicate_names", "a.jpg", "cat"):
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


def test_a_container_that_was_replaced_or_grew_is_indexed_again_and_while_running_no_image(forms, tmp_path):
    shutil.copytree(forms["tars"], tmp_path / "tars")
    root, cache = tmp_path / "tars" / "train", IndexCache(str(tmp_path / "cache"))
    for path in (*root.iterdir(), root):
        os.utime(path, (time.time() - 3600,) * 2)
    first = open_reader(source_of(str(root), "train"), cache)
    (root / "0.tar").write_bytes((root / "1.tar").read_bytes())
    with pytest.raises(BadImage, match="changed"):
        [first.encoded(i) for i in range(len(first))]
    with refused("duplicate_names"):
        open_reader(source_of(str(root), "train"), cache)


def test_the_originals_need_a_devkit_that_fits(forms, tmp_path):
    shutil.copytree(forms["originals"], tmp_path / "o")
    path = tmp_path / "o" / "ILSVRC2012_devkit_t12.tar.gz"
    devkit(path, CLASSES, CLASSES)
    with refused("invalid_labels", "4 labels"):
        build_data(options(tmp_path / "o"), train=False, evaluate=True)
    path.write_bytes(gzip.compress(bytes(300 << 20), 1))
    with refused("unreadable_data", path):
        build_data(options(tmp_path / "o"), train=False, evaluate=True)
    path.unlink()
    with refused("no_class_folders", "--val_labels"):
        build_data(options(tmp_path / "o"), train=False, evaluate=True)


# ------------------------------------------------------------------------------------------------- splits

@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_val_are_taken_with_a_word(forms, tmp_path, name):
    shutil.copytree(forms["folders"], tmp_path / "f")
    (tmp_path / "f" / "val").rename(tmp_path / "f" / name)
    data = build_data(options(tmp_path / "f"), train=True, evaluate=True)
    assert len(data.val) == 20 and any(f"{name}/" in note and "no val/" in note for note in data.notes)


def test_a_part_held_back_is_the_same_in_every_form_and_in_no_training(forms, tmp_path):
    found = set()
    for form in ("folders", "tars", "tar per class"):
        (tmp_path / form).mkdir()
        (tmp_path / form / "train").symlink_to(forms[form] / "train")
        data = build_data(options(tmp_path / form, val_fraction=0.2, seed=len(form)), train=True, evaluate=True)
        stems = [{(data.class_names[part.targets[i]], part.reader.stem(int(part._kept[i]))) for i in range(len(part))}
                 for part in (data.train, data.val)]
        assert not stems[0] & stems[1] and len(stems[0] | stems[1]) == 60 and len(stems[1]) == 12
        assert {len([1 for name, _ in stems[1] if name == folder]) for folder in CLASSES} == {3}
        found.add((frozenset(stems[1]), data.train.order, data.val.order))
        assert len(build_data(options(tmp_path / form, val_fraction=0.2), train=False, evaluate=True).val) == 12
    assert len(found) == 1
    assert len(build_data(options(forms["folders"], val_fraction=0.2), train=True, evaluate=True).train) == 60


# ------------------------------------------------------------------------------------------------- outages

def test_an_outage_of_the_data_is_waited_for_and_then_a_failure(forms, tmp_path, monkeypatch):
    shutil.copytree(forms["folders"], tmp_path / "f")
    data = build_data(options(tmp_path / "f", num_workers=1), train=True, evaluate=False)
    (tmp_path / "f").rename(tmp_path / "away")
    thread = threading.Timer(1.5, lambda: (tmp_path / "away").rename(tmp_path / "f"))
    thread.start()
    assert data.train.reader.encoded(0) == (tmp_path / "f" / "train" / CLASSES[0]).joinpath(
        os.path.basename(data.train.path(0))).read_bytes()
    thread.join()
    monkeypatch.setattr("datasets.images._patience", 0.3)
    shutil.rmtree(tmp_path / "f")
    loader = make_loader(data.train, options(tmp_path / "f", num_workers=1), [[(0, i, i) for i in range(4)]])
    with pytest.raises(Failure) as error:
        list(loader)
    assert error.value.code == "data_lost" and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(Failure):  # of a run to resume; a new one is refused
        build_data(options(tmp_path / "f"), train=True, evaluate=False, order=data.train.order)
    with refused("missing_data"):
        build_data(options(tmp_path / "f"), train=True, evaluate=False)


@pytest.mark.parametrize("given", ["", "train"])
def test_a_disk_that_is_mounted_late_is_waited_for_by_a_run_that_resumes(forms, tmp_path, monkeypatch, given):
    here = options(tmp_path / given) if not given else data_options(data_set="image_folder", data_path=str(tmp_path / given))
    (tmp_path / given).mkdir(exist_ok=True)
    order = build_data(options(forms["folders"]), train=True, evaluate=False).train.order
    late = ["mount", "--bind", str(forms["folders"] / given), str(tmp_path / given)]
    if subprocess.run(late, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    subprocess.run(["umount", late[-1]], check=True)
    monkeypatch.setattr("datasets.images._patience", 0.3)
    with pytest.raises(Failure):
        build_data(here, train=True, evaluate=False, order=order)
    monkeypatch.setattr("datasets.images._patience", 30.0)
    thread = threading.Timer(1, subprocess.run, [late])
    thread.start()
    try:
        assert build_data(here, train=True, evaluate=False, order=order).train.order == order
    finally:
        thread.join()
        subprocess.run(["umount", "-l", late[-1]], check=True)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_errors_that_may_pass_are_tried_again(tmp_path, number, monkeypatch):
    calls = []

    def answer():
        calls.append(1)
        if len(calls) < 4:
            raise OSError(number, os.strerror(number))
        return b"data"
    assert retried(answer, str(tmp_path)) == b"data" and len(calls) == 4
    with pytest.raises(FileNotFoundError):
        retried(lambda: os.stat(tmp_path / "none"), str(tmp_path))
