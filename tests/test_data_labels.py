"""From folder names to logits: ImageNet's and the 22k order, one's own classes, mismatches, flat val folders."""
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from common.errors import UserError
from common.log import setup_logging
from common.synsets import imagenet_synsets, published_22k_synsets
from datasets.build import build_data
from datasets.labels import classes_of, map_folders
from tests.kits.options import data_options


def _tree(root, folders, pictures=2):
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(pictures):
            Image.new("RGB", (40, 40), (9 * i, 0, 0)).save(root / folder / f"{i}.jpg")
    return str(root)


def _data(root, train=True, evaluate=True, class_names=None, **changes):
    options = data_options(**{"data_set": "IMNET", "data_path": str(root), "input_size": 32, **changes})
    return build_data(options, train=train, evaluate=evaluate, class_names=class_names)


def test_the_22k_order_has_the_published_tail():
    listed = published_22k_synsets()
    assert len(listed) == len(set(listed)) == 10459 and set(imagenet_synsets()) < set(listed)
    assert (listed[10450], listed[10458]) == ("n02085782", "n04399382")
    found = classes_of(sorted(listed), None, imagenet_layout=False)
    assert tuple(found.names) == listed and not found.notes


def test_a_part_of_imagenet_keeps_imagenets_labels(tmp_path):
    chosen = [imagenet_synsets()[i] for i in (0, 417, 999)]
    _tree(tmp_path / "val", chosen, 1)
    data = _data(tmp_path, train=False)
    assert data.num_classes == 1000 and data.val.targets.tolist() == [0, 417, 999] and data.train is None
    assert any("3 of 1000 classes" in note for note in data.notes)
    assert any("3 pictures, the ImageNet validation set has 50000" in note for note in data.notes)


@pytest.mark.parametrize("nb_classes, expected", [(None, 1000), (1000, 1000), (3, 3)])
def test_nb_classes_decides_whether_synsets_are_imagenets(nb_classes, expected):
    found = classes_of([imagenet_synsets()[i] for i in (0, 417, 999)], nb_classes, imagenet_layout=True)
    assert len(found.names) == expected


def test_without_nb_classes_own_folders_count_and_image_folder_counts_synsets_too():
    assert classes_of(["n10000000", "n10001111"], None, imagenet_layout=True).names == ["n10000000", "n10001111"]
    assert len(classes_of(list(imagenet_synsets()[:5]), None, imagenet_layout=False).names) == 5


def test_a_stray_folder_among_synsets_is_named():
    folders = sorted([*imagenet_synsets()[:30], "backup"])
    with pytest.raises(UserError, match="^backup among 31 synset folders .* --allow_class_mismatch true"):
        classes_of(folders, None, imagenet_layout=True)
    assert len(classes_of(folders, None, imagenet_layout=True, allow_mismatch=True).names) == 1000
    with pytest.raises(UserError, match="--nb_classes 7 does not fit the 2 class folders"):
        classes_of(["a", "b"], 7, imagenet_layout=True)


def test_val_is_mapped_by_name_and_mismatches_are_named(tmp_path):
    _tree(tmp_path / "train", ["ant", "bee", "cat"])
    _tree(tmp_path / "val", ["ant", "cat", "dog"])
    with pytest.raises(UserError, match="The val data .* folders of no known class: dog and has no folder for bee; .*"
                                        "--allow_class_mismatch true"):
        _data(tmp_path)
    data = _data(tmp_path, allow_class_mismatch=True)
    assert data.class_names == ["ant", "bee", "cat"] and data.val.targets.tolist() == [0, 0, 2, 2]
    assert "val: 2 images of folders without a class are left out" in data.notes
    assert [data.val.path(i).split("/")[-2] for i in range(4)] == ["ant", "ant", "cat", "cat"]


def test_the_train_folder_decides_in_evaluation_and_a_checkpoints_list_before_it(tmp_path):
    _tree(tmp_path / "train", ["ant", "bee", "cat"])
    _tree(tmp_path / "val", ["ant", "bee", "cat"], 1)
    assert _data(tmp_path, train=False).class_names == ["ant", "bee", "cat"]
    data = _data(tmp_path, train=False, class_names=["cat", "bee", "ant"])
    assert data.class_names == ["cat", "bee", "ant"] and data.val.targets.tolist() == [2, 1, 0]
    with pytest.raises(UserError, match="None of the 3 class folders in the val data"):
        _data(tmp_path, train=False, class_names=["x", "y"])
    with pytest.raises(UserError, match="has no folder for dog"):
        _data(tmp_path, train=True, class_names=["ant", "bee", "cat", "dog"])


def test_numbered_folders_sorted_as_text_are_explained(tmp_path):
    folders = sorted(str(i) for i in range(11))
    _tree(tmp_path / "val", folders, 1)
    with pytest.raises(UserError, match="class folders are numbers and sort as text, so folder '10' is class 2"):
        _data(tmp_path, train=False)
    _tree(tmp_path / "train", folders, 1)
    assert any("folder '10' is class 2" in note for note in _data(tmp_path).notes)
    padded = sorted(f"{i:02d}" for i in range(11))
    assert not classes_of(padded, None, imagenet_layout=True, evaluating=True).notes


def test_image_folder_takes_the_train_folder_itself(tmp_path):
    train, val = _tree(tmp_path / "t", ["a", "b"]), _tree(tmp_path / "v", ["a", "b"], 1)
    data = _data(train, data_set="image_folder", eval_data_path=val)
    assert (len(data.train), len(data.val), data.num_classes) == (4, 2, 2)
    with pytest.raises(UserError, match="--eval_data_path"):
        _data(train, data_set="image_folder")
    assert _data(train, data_set="image_folder", evaluate=False).val is None
    _tree(tmp_path / "both" / "train", ["a", "b"]), _tree(tmp_path / "both" / "val", ["a", "b"])
    with pytest.raises(UserError, match="train/ and val/, which are no classes; .* --data_path .*both/train"):
        _data(tmp_path / "both", data_set="image_folder", evaluate=False)


def test_pictures_without_class_folders_or_classes_without_pictures_are_errors_in_training(tmp_path):
    _tree(tmp_path / "train", ["."])
    with pytest.raises(UserError, match="no class folders; sort them"):
        _data(tmp_path, evaluate=False)
    _tree(tmp_path / "train", ["a"])
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(UserError, match="1 class folders in .* hold no image, such as b"):
        _data(tmp_path, evaluate=False)
    with pytest.raises(UserError, match="There is no folder .*nowhere/train"):
        _data(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--data_set MNIST is not one of"):
        _data(tmp_path, data_set="MNIST")


@pytest.fixture
def flat(tmp_path):
    """Three pictures without class folders, of ImageNet's classes 7, 3 and 7."""
    (tmp_path / "val").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / f"ILSVRC2012_val_0000000{i + 1}.JPEG")
    return tmp_path


LABELS = [imagenet_synsets()[i] for i in (7, 3, 7)]


def test_a_flat_val_folder_takes_a_csv_or_the_devkits_file(flat):
    with pytest.raises(UserError, match="--val_labels FILE"):
        _data(flat, train=False)
    table = flat / "labels.csv"
    table.write_text("ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_0000000{i + 1},{name} 85 1 499 272\n" for i, name in reversed(list(enumerate(LABELS)))))
    assert _data(flat, train=False, val_labels=str(table)).val.targets.tolist() == [7, 3, 7]
    table.write_text("".join(f"ILSVRC2012_val_0000000{i + 1}.JPEG,{name}\n" for i, name in enumerate(LABELS)))
    assert _data(flat, train=False, val_labels=str(table)).val.targets.tolist() == [7, 3, 7]
    truth = flat / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("490\n361\n490\n")
    with pytest.raises(UserError, match=r"needs the devkit's meta\.mat"):
        _data(flat, train=False, val_labels=str(truth))
    synsets = np.array([(490, LABELS[0], "x"), (361, LABELS[1], "y")],
                       dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    savemat(flat / "meta.mat", {"synsets": synsets})
    assert _data(flat, train=False, val_labels=str(truth)).val.targets.tolist() == [7, 3, 7]


@pytest.mark.parametrize("text, sentence", [
    ("490\n361\n", "has 2 labels for 3 pictures"), ("ILSVRC2012_val_00000001,n01440764\n", "has no line for"),
    ("", "has no line for"), (None, "cannot be read")])
def test_unfitting_label_files_are_explained(flat, text, sentence):
    table = flat / "labels.txt"
    if text is not None:
        table.write_text(text)
    with pytest.raises(UserError, match=sentence):
        _data(flat, train=False, val_labels=str(table))


def test_labels_that_class_folders_make_needless_are_told(tmp_path, capsys):
    _tree(tmp_path / "val", imagenet_synsets()[:2], 1)
    setup_logging()
    _data(tmp_path, train=False, val_labels=str(tmp_path / "labels.csv"))
    assert "--val_labels has no effect" in capsys.readouterr().err


def test_mapping_gives_minus_one_only_when_allowed():
    with pytest.raises(UserError, match="^The val data has folders of no known class: z"):
        map_folders(["a", "z"], ["a", "b"], partial=True, allow_mismatch=False, what="the val data")
    assert map_folders(["a", "z"], ["b", "a"], partial=True, allow_mismatch=True, what="x").tolist() == [1, -1]
