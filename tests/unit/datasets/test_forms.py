"""The same images in every form: the same order, digest, labels and bytes, and so the same batches."""
import numpy as np
import pytest

from common.synsets import imagenet_synsets
from datasets.build import build_data, eval_loader
from tests.kits.errors import refused
from tests.kits.forms import FORMS, read_tree, write_all
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
    assert plain.class_names == other.class_names and plain.order == other.order == plain.train.order


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_evaluated_once_over_all_ranks(forms, form, world):
    data = build_data(options(forms[form]), train=False, evaluate=True)
    seen = [i for rank in range(world) for batch in eval_loader(data, options(forms[form]), rank, world)
            for i in batch.indices.tolist()]
    assert sorted(seen) == list(range(20))


def test_training_from_parquet_is_refused_with_the_command_that_helps(forms):
    with refused("slow_form", "tools.data pack", "--allow_slow_parquet"):
        build_data(data_options(data_set="IMNET", data_path=str(forms["parquet"])), train=True, evaluate=False)
