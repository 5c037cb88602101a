"""From folder names to logits: ImageNet's and the 22k order, one's own classes, mismatches, label files."""
import os

import numpy as np
import pytest
from scipy.io import savemat

from common.synsets import imagenet_synsets, published_22k_synsets
from datasets.labels import classes_of, map_folders, read_val_labels
from tests.kits.errors import refused


def test_the_22k_order_has_the_published_tail():
    listed = published_22k_synsets()
    assert len(listed) == len(set(listed)) == 10459 and set(imagenet_synsets()) < set(listed)
    assert (listed[10450], listed[10458]) == ("n02085782", "n04399382")
    names, notes = classes_of(sorted(listed), None, imagenet_layout=False)
    assert tuple(names) == listed and not notes


@pytest.mark.parametrize("nb_classes, expected", [(None, 1000), (1000, 1000), (3, 3)])
def test_nb_classes_decides_whether_synsets_are_imagenets(nb_classes, expected):
    names, _ = classes_of([imagenet_synsets()[i] for i in (0, 417, 999)], nb_classes, imagenet_layout=True)
    assert len(names) == expected


def test_without_nb_classes_own_folders_count_and_image_folder_counts_synsets_too():
    assert classes_of(["n10000000", "n10001111"], None, imagenet_layout=True)[0] == ["n10000000", "n10001111"]
    assert len(classes_of(list(imagenet_synsets()[:5]), None, imagenet_layout=False)[0]) == 5
    padded = sorted(f"{i:02d}" for i in range(11))
    assert not classes_of(padded, None, imagenet_layout=True, evaluating=True)[1]


def test_a_stray_folder_among_synsets_is_named():
    folders = sorted([*imagenet_synsets()[:30], "backup"])
    with refused("unexpected_classes", "backup", "--allow_class_mismatch"):
        classes_of(folders, None, imagenet_layout=True)
    assert len(classes_of(folders, None, imagenet_layout=True, allow_mismatch=True)[0]) == 1000
    with refused("unexpected_classes", "--nb_classes 7", "--nb_classes 2"):
        classes_of(["a", "b"], 7, imagenet_layout=True)


def test_mapping_gives_minus_one_only_when_allowed():
    with refused("unexpected_classes", "folders of no known class: z"):
        map_folders(["a", "z"], ["a", "b"], partial=True, allow_mismatch=False, what="x")
    assert map_folders(["a", "z"], ["b", "a"], partial=True, allow_mismatch=True, what="x").tolist() == [1, -1]


FILES = [f"ILSVRC2012_val_0000000{i + 1}.JPEG" for i in range(3)]
LABELS = [imagenet_synsets()[i] for i in (7, 3, 7)]
ROWS = "".join(f"{name},{label}\n" for name, label in zip(FILES, LABELS, strict=True))


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("text", [
    ROWS, ROWS.replace(".JPEG", ""), ROWS.replace(".JPEG", ".jpg"), ROWS.replace("ILSV", "val/ILSV"),
    "ImageId,PredictionString\n" + ROWS.replace(".JPEG", "").replace("\n", " 85 1 499 272\n"), ROWS + "other.JPEG,n01440764\n"])
def test_label_files_of_each_kind_are_read(tmp_path, text):
    assert read_val_labels(write(tmp_path / "labels.csv", text), FILES) == LABELS


def test_two_files_that_differ_in_their_endings_have_labels_of_their_own(tmp_path):
    path = write(tmp_path / "labels.csv", "a.png,cat\na.jpg,dog\n")
    assert read_val_labels(path, ["a.jpg", "a.png"]) == ["dog", "cat"]


@pytest.mark.parametrize("text, word", [
    ("490\n361\n", "2 labels for 3 images"), ("ILSVRC2012_val_00000001,n01440764\n", FILES[1]), ("", FILES[0]),
    (b"\xff\xd8\xff\xe0", "cannot be read"), (ROWS + ROWS[:ROWS.index("\n") + 1], f"{FILES[0]} twice"),
    (ROWS + ROWS[:ROWS.index("\n") + 1].replace(".JPEG", ""), "twice"), ("490\n361\n490\n", "meta.mat")])
def test_unfitting_label_files_are_refused(tmp_path, text, word):
    path = write(tmp_path / "labels.txt", text)
    with refused("invalid_labels", path if "meta" not in word else "labels.txt", word):
        read_val_labels(path, FILES)


def test_only_regular_files_are_read_as_labels(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "huge.csv", "wb") as file:
        file.truncate(1 << 40)
    for path in ("/dev/zero", tmp_path / "fifo", tmp_path / "huge.csv", tmp_path, tmp_path / "missing"):
        with refused("invalid_labels", str(path)):
            read_val_labels(str(path), FILES)


def test_the_devkits_numbers_are_explained_by_its_meta_file(tmp_path):
    truth = write(tmp_path / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n490\n")
    synsets = np.array([(490, LABELS[0], "x"), (361, LABELS[1], "y")],
                       dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    assert read_val_labels(truth, FILES) == LABELS
    write(tmp_path / "meta.mat", "damaged")
    with refused("invalid_labels", "meta.mat"):
        read_val_labels(truth, FILES)
    (tmp_path / "meta.mat").unlink()
    os.mkfifo(tmp_path / "meta.mat")
    with refused("invalid_labels", "meta.mat"):
        read_val_labels(truth, FILES)
