"""CIFAR as distributed or pickled by others, read without executing a pickle."""
import pickle

import numpy as np
import pytest

from datasets.build import build_data, eval_loader
from datasets.cifar import read_arrays, read_cifar
from tests.kits.errors import Hostile, refused
from tests.kits.options import data_options

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)


def write(root, protocol=3, spell=str.encode, labels=list):
    """CIFAR-100 with 8 + 4 images, as distributed: a pickle with `spell`ed keys and names."""
    (root / "cifar-100-python").mkdir(exist_ok=True)
    files = {name: {spell("data"): PIXELS[:count], spell("fine_labels"): labels(range(count)), spell("batch_label"): b""}
             for name, count in (("train", 8), ("test", 4))}
    files["meta"] = {spell("fine_label_names"): [spell(f"class{i:02}") for i in range(100)]}
    for name, content in files.items():
        (root / "cifar-100-python" / name).write_bytes(pickle.dumps(content, protocol))


def test_cifar_is_read_as_it_is(tmp_path):
    write(tmp_path)
    options = data_options(data_set="CIFAR", data_path=str(tmp_path), input_size=32, batch_size=4)
    data = build_data(options, train=True, evaluate=True)
    assert data.num_classes == 100 and data.class_names[3] == "class03"
    assert data.train.targets.tolist() == list(range(8)) and data.val.path(2).endswith("test[2]")
    batch = next(iter(eval_loader(data, options)))
    assert np.array_equal(batch.images.numpy().transpose(0, 3, 1, 2).reshape(4, -1), PIXELS[:4])
    assert data.train.pixels(7, 0).shape == (32, 32, 3)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("labels", [list, np.array, lambda values: [np.int64(value) for value in values]])
def test_pickles_of_python_3_are_read(tmp_path, protocol, labels):
    write(tmp_path, protocol, str, labels)
    reader = read_cifar(str(tmp_path), 100, train=True)
    assert np.array_equal(reader.pixels.transpose(0, 3, 1, 2).reshape(8, -1), PIXELS)
    assert reader.labels.tolist() == list(range(8)) and reader.classes[99] == "class99"


def test_the_original_files_written_by_python_2_are_read(tmp_path):
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86"
             b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             b"\x89U\x06ABCDEFtb")
    (tmp_path / "file").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x06K\x09eu.")
    content = read_arrays(str(tmp_path / "file"))
    assert content["data"].tolist() == [[65, 66, 67], [68, 69, 70]] and content["labels"] == [6, 9]


def test_what_is_no_cifar_is_one_sentence_and_nothing_of_it_is_executed(tmp_path):
    write(tmp_path)
    file, mark = tmp_path / "cifar-100-python" / "train", tmp_path / "owned"
    for content in ({b"data": Hostile(mark)}, [1, 2], {b"data": np.array([Hostile(mark)], dtype=object)}, {},
                    {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 100]}, b"\x80\x02garbage", b""):
        file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=3))
        with refused("unreadable_data", file):
            read_cifar(str(tmp_path), 100, train=True)
    write(tmp_path)
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a"]}))
    for classes, code in ((100, "unreadable_data"), (10, "unreadable_data"), (7, "unexpected_classes")):
        with refused(code):
            read_cifar(str(tmp_path), classes, train=True)
    assert not mark.exists()
