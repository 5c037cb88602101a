"""From folder names to logits: ImageNet's and the 22k order, one's own classes, mismatches, label files."""
import os

import pytest

from common.synsets import imagenet_synsets, published_22k_synsets
from datasets.labels import classes_of, read_val_labels
from tests.kits.errors import refused
from tests.kits.forms import meta_file


def test_the_22k_order_has_the_published_tail():
    listed = published_22k_synsets()
    assert len(listed) == len(set(listed)) == 10459 and set(imagenet_synsets()) < set(listed)
    assert (listed[10450], listed[10458]) == ("n02085782", "n04399382")
    assert tuple(classes_of(sorted(listed), None, imagenet_layout=False)) == listed


@pytest.mark.parametrize("folders, nb_classes, layout, expected", [
    (imagenet_synsets()[:3], None, True, 1000), (imagenet_synsets()[:3], 1000, True, 1000), (imagenet_synsets()[:3], 3, True, 3),
    (imagenet_synsets()[:5], None, False, 5), (["n10000000", "n10001111"], None, True, 2)])
def test_nb_classes_and_layout_decide_whether_synsets_are_imagenets(folders, nb_classes, layout, expected):
    assert len(classes_of(list(folders), nb_classes, imagenet_layout=layout)) == expected


def test_a_stray_folder_among_synsets_is_named():
    folders = sorted([*imagenet_synsets()[:30], "backup"])
    with refused("unexpected_classes", "backup", "--allow_class_mismatch"):
        classes_of(folders, None, imagenet_layout=True)
    assert len(classes_of(folders, None, imagenet_layout=True, allow_mismatch=True)) == 1000
    with refused("unexpected_classes", "--nb_classes 7", "--nb_classes 2"):
        classes_of(["a", "b"], 7, imagenet_layout=True)


FILES = [f"ILSVRC2012_val_0000000{i + 1}.JPEG" for i in range(3)]
LABELS = [imagenet_synsets()[i] for i in (7, 3, 7)]
ROWS = "".join(f"{name},{label}\n" for name, label in zip(FILES, LABELS, strict=True))


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("text, files, labels", [
    *((text, FILES, LABELS) for text in (
        ROWS, ROWS.replace(".JPEG", ""), ROWS.replace(".JPEG", ".jpg"), ROWS.replace("ILSV", "val/ILSV"),
        "ImageId,PredictionString\n" + ROWS.replace(".JPEG", "").replace("\n", " 85 1 499 272\n"), ROWS + "other.JPEG,n01440764\n")),
    ("a.png,cat\na.jpg,dog\n", ["a.jpg", "a.png"], ["dog", "cat"])])
def test_label_files_of_each_kind_are_read(tmp_path, text, files, labels):
    assert read_val_labels(write(tmp_path / "labels.csv", text), files) == labels


@pytest.mark.parametrize("text, word", [
    ("ILSVRC2012_val_00000001,n01440764\n", FILES[1]), ("", FILES[0]),
    (b"\xff\xd8\xff\xe0", "cannot be read"), (ROWS + ROWS[:ROWS.index("\n") + 1], f"{FILES[0]} twice"),
    (ROWS + ROWS[:ROWS.index("\n") + 1].replace(".JPEG", ""), "twice"), ("490\n361\n490\n", "meta.mat")])
def test_unfitting_label_files_are_refused(tmp_path, text, word):
    with refused("invalid_labels", "labels.txt", word):
        read_val_labels(write(tmp_path / "labels.txt", text), FILES)


def test_only_regular_files_are_read_as_labels(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "huge.csv", "wb") as file:
        file.truncate(1 << 40)
    for path in ("/dev/zero", tmp_path / "fifo", tmp_path / "huge.csv", tmp_path, tmp_path / "missing"):
        with refused("invalid_labels", path):
            read_val_labels(str(path), FILES)


def test_the_devkits_numbers_are_explained_by_its_meta_file(tmp_path):
    truth, meta = write(tmp_path / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n490\n"), tmp_path / "meta.mat"
    meta.write_bytes(meta_file({LABELS[0]: 490, LABELS[1]: 361}))
    assert read_val_labels(truth, FILES) == LABELS
    meta.write_bytes(b"damaged")
    with refused("invalid_labels", "meta.mat"):
        read_val_labels(truth, FILES)
    meta.unlink()
    os.mkfifo(meta)
    with refused("invalid_labels", "meta.mat"):
        read_val_labels(truth, FILES)
