"""What the options mean on the disk: layouts, which classes decide, what is refused and what is noted."""
import os

from PIL import Image

from common.log import setup_logging
from common.synsets import imagenet_synsets
from datasets.build import build_data, check_sample
from tests.kits.errors import refused as sentence
from tests.kits.images import fill_folder, jpeg
from tests.kits.options import data_options

SYNSETS = imagenet_synsets()


def tree(root, *folders, images=2):
    for folder in folders:
        fill_folder(root / folder, images)
    return str(root)


def build(root, train=True, evaluate=True, class_names=None, **changes):
    options = data_options(**{"data_set": "IMNET", "data_path": str(root), "input_size": 32, **changes})
    return build_data(options, train=train, evaluate=evaluate, class_names=class_names)


def refused(code, *words, **arguments):
    with sentence(code, *words):
        build(**arguments)


def test_a_part_of_imagenet_keeps_imagenets_labels(tmp_path, capsys):
    tree(tmp_path / "val", SYNSETS[0], SYNSETS[417], SYNSETS[999], images=1)
    setup_logging()
    data = build(tmp_path, train=False, val_labels="labels.csv")
    assert data.num_classes == 1000 and data.val.targets.tolist() == [0, 417, 999] and data.train is None
    assert any("3 of 1,000 classes" in note for note in data.notes)
    assert any("3 images, the ImageNet validation set has 50000" in note for note in data.notes)
    assert "--val_labels has no effect" in capsys.readouterr().err


def test_val_is_mapped_by_name_and_mismatches_and_files_left_out_are_named(tmp_path):
    tree(tmp_path / "train", "ant", "bee", "cat")
    tree(tmp_path / "val", "ant", "cat", "dog")
    for name in ("x.svg", "y.svg", "z.txt", "._0.jpg"):
        (tmp_path / "val" / "ant" / name).touch()
    refused("unexpected_classes", "unknown classes: dog", "no class bee", "--allow_class_mismatch true", root=tmp_path)
    data = build(tmp_path, allow_class_mismatch=True)
    assert data.class_names == ["ant", "bee", "cat"] and data.val.targets.tolist() == [0, 0, 2, 2]
    assert "val: 2 images of unknown classes are skipped" in data.notes
    assert data.notes.count("val: skipped, not images: 2 .svg, 1 .txt") == 1 == sum("skipped, not" in note for note in data.notes)
    assert [data.val.path(i).split("/")[-2] for i in range(4)] == ["ant", "ant", "cat", "cat"]
    assert data.describe()["val"] == {"images": 4, "per_class": [2, 0, 2], "left_out": {".svg": 2, ".txt": 1},
                                      "form": "class folders", "order": data.val.order}


def test_the_train_folder_decides_in_evaluation_and_a_checkpoints_list_before_it(tmp_path):
    tree(tmp_path, *(f"{part}/{name}" for part in ("train", "val") for name in ("ant", "bee", "cat")), images=1)
    assert build(tmp_path, train=False).class_names == ["ant", "bee", "cat"]
    data = build(tmp_path, train=False, class_names=["cat", "bee", "ant"])
    assert data.class_names == ["cat", "bee", "ant"] and data.val.targets.tolist() == [2, 1, 0]
    refused("unexpected_classes", "no class x, y", root=tmp_path, train=False, class_names=["x", "y"])
    refused("unexpected_classes", "dog", root=tmp_path, class_names=["ant", "bee", "cat", "dog"])


def test_numbered_folders_sorted_as_text_are_explained(tmp_path):
    tree(tmp_path / "val", *map(str, range(11)), images=1)
    refused("unexpected_classes", "folder '10' is class 2", "leading zeros", root=tmp_path, train=False)
    assert build(tmp_path, train=False, allow_class_mismatch=True).num_classes == 11
    (tmp_path / "train").symlink_to("val")
    assert any("folder '10' is class 2" in note for note in build(tmp_path).notes)
    tree(tmp_path / "padded" / "val", *(f"{i:02}" for i in range(11)), images=1)
    assert build(tmp_path / "padded", train=False).num_classes == 11


def test_image_folder_takes_the_train_folder_itself(tmp_path):
    tree(tmp_path, "train/a", "train/b", "val/a", "val/b")
    train = str(tmp_path / "train")
    data = build(train, data_set="image_folder", eval_data_path=str(tmp_path / "val"))
    assert (len(data.train), len(data.val), data.num_classes) == (4, 4, 2)
    refused("missing_data", "--eval_data_path", root=train, data_set="image_folder")
    assert build(train, data_set="image_folder", evaluate=False).val is None
    refused("no_class_folders", train, "--data_path", root=tmp_path, data_set="image_folder", evaluate=False)


def test_images_without_class_folders_classes_without_images_and_one_class_only_are_refused(tmp_path):
    tree(tmp_path / "train", ".")
    refused("no_class_folders", f"{tmp_path}/train", root=tmp_path, evaluate=False)
    tree(tmp_path / "train", "a")
    refused("one_class", "(a)", root=tmp_path, evaluate=False)
    (tmp_path / "train" / "b").mkdir()
    refused("unexpected_classes", "such as b", root=tmp_path, evaluate=False)
    refused("one_class", root=tmp_path, evaluate=False, allow_class_mismatch=True)
    refused("missing_data", "nowhere/train", root=tmp_path / "nowhere")
    tree(tmp_path / "one" / "val", "a")
    refused("one_class", root=tmp_path / "one", train=False)


def test_a_flat_val_folder_needs_labels_and_unknown_ones_are_named(tmp_path):
    tree(tmp_path, "val", images=3)
    refused("no_class_folders", "--val_labels FILE", root=tmp_path, train=False)
    table = tmp_path / "labels.csv"
    table.write_text(f"0.JPEG,{SYNSETS[7]}\n1.JPEG,{SYNSETS[3]}\n2.JPEG,n99999999\n")
    flat = dict(root=tmp_path, train=False, val_labels=str(table), class_names=list(SYNSETS))
    refused("unexpected_classes", "unknown classes: n99999999", **flat)
    assert build(**flat, allow_class_mismatch=True).val.targets.tolist() == [7, 3]


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path):
    for name in (b"caf\xe9", b"dog"):
        folder = os.path.join(os.fsencode(tmp_path), b"train", name)
        os.makedirs(folder)
        with open(os.path.join(folder, b"na\xefve.jpg"), "wb") as file:
            file.write(jpeg(0))
    data = build(tmp_path, evaluate=False)
    assert check_sample(data.train)[1] == [] and all(note.encode() for note in data.notes)


def test_exif_orientation_reaches_training_and_evaluation(tmp_path):
    tree(tmp_path, "train/a", "train/b", "val/a", "val/b", images=0)
    exif, half = Image.Exif(), Image.new("RGB", (32, 32))
    exif[0x0112] = 3  # upside down
    half.paste((255, 255, 255), (0, 0, 32, 16))
    for folder in tmp_path.glob("*/*"):
        half.save(folder / "0.png", exif=exif)
    for wanted, top in ((False, 255), (True, 0)):
        data = build(tmp_path, exif_orientation=wanted, hflip=0, aa="none", color_jitter=0)
        assert data.val.pixels(0)[0, 0, 0] == data.train.pixels(0, 0)[8, 16, 0] == top
