"""One set of real JPEGs in every form: the same global batches, also after a resume that changes the form, the
processes and the workers at once, and the same evaluation; which classes a form has, splits, outages."""
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import cache, partial

import numpy as np
import pytest
import torch

from common.errors import Failure
from common.synsets import imagenet_synsets
from datasets.build import build_data, eval_loader
from datasets.dataset import make_loader
from datasets.images import BadImage, decode, retried
from datasets.index import IndexCache
from main import main
from tests.kits import numbers
from tests.kits.batches import prepared
from tests.kits.docs import ROOT
from tests.kits.errors import refused
from tests.kits.forms import FORMS, read, write_all, write_tar
from tests.kits.images import jpeg
from tests.kits.options import data_options
from tests.kits.trained import lively
from tools.data import main as tool

CLASSES = [imagenet_synsets()[i] for i in range(0, 1000, 100)]
GLOBAL = 48


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("forms"), CLASSES, 144, 20)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("many"), CLASSES, 2000, 200)


def options(path, **changes):
    return data_options(**{"data_set": "IMNET", "data_path": str(path), "input_size": 32, "allow_slow_parquet": True} | changes)


@cache
def hashes(path, world: int = 1, workers: int = 0, first: int = 0) -> list[str]:
    """sha256 of each global batch of epoch 3 from update `first` on: images and targets as the network gets
    them, from all ranks."""
    values = options(path, batch_size=GLOBAL // world, reprob=0.5, num_workers=workers)
    updates = zip(*(values.split(GLOBAL) for values in prepared(values, world, epoch=3, start=first)))
    return [hashlib.sha256(images.numpy().tobytes() + targets.numpy().tobytes()).hexdigest() for images, targets in updates]


def check_batches(forms, form):
    expected = hashes(forms["folders"])
    assert len(expected) == len(set(expected)) >= 3
    assert hashes(forms[form], world=2) == hashes(forms[form], world=3, workers=1) == expected
    assert hashes(forms[form], workers=2, first=1) == expected[1:]


@pytest.mark.parametrize("form", FORMS)
def test_images_and_global_batches_are_equal_in_every_form_on_1_2_and_3_processes(forms, form):
    check_batches(forms, form)
    plain, other = (build_data(options(forms[name]), train=True, evaluate=True) for name in ("folders", form))
    for a, b in ((plain.train, other.train), (plain.val, other.val)):
        assert a.order == b.order and len(a.order) == 32 and np.array_equal(a.targets, b.targets)
        assert a.reader.classes == b.reader.classes == CLASSES and not b.reader.left_out
        assert [a.reader.encoded(i) for i in range(len(a))] == [b.reader.encoded(i) for i in range(len(b))]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_global_batches_of_2000_images_are_equal(many, form):
    check_batches(many, form)


def flags(**values) -> list[str]:
    values = {"device": "cpu", "model": "hornet_pico_7x7", "input_size": 32, **values}
    return [word for option, value in values.items() for word in (f"--{option}", str(value))]


@pytest.mark.slow
def test_a_resume_may_change_form_processes_and_workers_at_once(forms, tmp_path):
    def train(form, folder, processes, workers, stop_after):
        argv = flags(epochs=1, global_batch=12, batch_size=12 // processes, num_workers=workers, data_path=forms[form],
                     output_dir=tmp_path / folder, index_cache=tmp_path / "cache", disable_eval="true", nb_classes=10,
                     allow_slow_parquet="true", warmup_epochs=0, print_freq=1)
        codes, seen = numbers.train(argv, tmp_path, processes, stop_after)
        assert codes == [75 if stop_after is not None else 0] * processes, numbers.console(tmp_path)
        return [update["batch"] for update in seen]

    undisturbed = train("tars", "a", 1, 0, None)
    resumed = train("folders", "b", 1, 0, 2) + train("parquet", "b", 2, 1, 6) + train("packed", "b", 3, 0, 8) \
        + train("webdataset", "b", 2, 2, None)
    assert undisturbed == resumed and len(set(undisturbed)) == 12


@pytest.mark.slow
def test_hits_eval_json_and_predictions_are_the_same_from_every_form(many, tmp_path):
    torch.save({"model": lively("hornet_pico_7x7", 1000).state_dict()}, tmp_path / "w.pth")
    found = {}
    for form, path in many.items():
        folder = tmp_path / form.replace(" ", "_")
        assert main(flags(eval="true", resume=tmp_path / "w.pth", data_path=path, num_workers=0, batch_size=8,
                          output_dir=folder, report=folder, index_cache=tmp_path / "cache")) == 0
        result = json.loads((folder / "eval.json").read_text())
        with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
            found[form] = result, {name: stored[name] for name in stored.files if name != "path"}
    plain, plain_arrays = found["folders"]
    for form, (result, arrays) in found.items():
        # Parquet is read in its own order, so its last batch is another, and float32 ends in other last bits.
        exact = form != "parquet"
        different = {name for name in plain if result[name] != plain[name] and (exact or result[name] != pytest.approx(
            plain[name], rel=1e-5))}
        assert different <= {"seconds", "images_per_second"} and arrays.keys() == plain_arrays.keys(), (form, different)
        for name, values in arrays.items():
            close = np.array_equal if exact or values.dtype.kind != "f" else partial(np.allclose, rtol=1e-4, atol=1e-6)
            assert close(values, plain_arrays[name]), (form, name)


@pytest.mark.parametrize("form", ["folders", "parquet"])
@pytest.mark.parametrize("world", [1, 3, 7])
def test_each_image_is_evaluated_once_with_its_label_and_parquet_in_its_own_order(forms, form, world):
    data = build_data(options(forms[form]), train=False, evaluate=True)
    batches = [batch for rank in range(world) for batch in eval_loader(data, options(forms[form], batch_size=2), rank, world)]
    assert all(batch.epoch == -1 and len(batch.images) <= 3 and (batch.positions == -1).all() for batch in batches)
    seen, targets = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("indices", "targets"))
    assert sorted(seen) == list(range(20)) and np.array_equal(targets, data.val.targets[seen])
    reader = data.val.reader
    if form == "parquet":
        places = [(reader.container(i), reader.offsets[i]) for i in seen]
        assert places == sorted(places) and seen.tolist() != sorted(seen)


def test_training_from_parquet_is_refused_with_the_command_that_helps_and_without_pyarrow_in_one_sentence(forms, monkeypatch):
    with refused("slow_form", "tools.data pack", "MB, about 0:0", "--allow_slow_parquet"):
        build_data(options(forms["parquet"], allow_slow_parquet=False), train=True, evaluate=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("missing_package", "pip install pyarrow"):
        read(forms["parquet"] / "data")


@pytest.mark.parametrize("count, classes", [(1000, list(imagenet_synsets())), (12, [f"{i:02}" for i in range(12)])])
def test_webdataset_classes_without_names_are_synsets_when_there_are_1000_and_numbers_otherwise(tmp_path, count, classes):
    write_tar(tmp_path / "0.tar", [(f"s{i}.{kind}", b"%d" % i) for i in range(count) for kind in ("jpg", "cls")])
    reader = read(tmp_path)
    assert reader.classes == classes and reader.labels.tolist() == list(range(count))


def test_parquet_names_come_from_its_metadata_and_gzipped_and_misnamed_images_are_read(tmp_path):
    FORMS["parquet"](tmp_path, {"train": [
        ("cat", "a.png", jpeg(0)), ("dog", "b.JPEG", gzip.compress(jpeg(1))), ("dog", "c.JPEG", jpeg(2))]})
    reader = read(tmp_path / "data")
    assert reader.classes == ["text cat", "text dog"] and reader.form == "parquet (2 files)"
    assert [decode(reader.encoded(i)).size for i in range(3)] == [(40, 36)] * 3


def test_a_container_that_was_replaced_or_grew_is_indexed_again_and_while_running_no_image(forms, tmp_path):
    shutil.copytree(forms["tars"] / "train", tmp_path / "train")
    for path in (*(tmp_path / "train").iterdir(), tmp_path / "train"):
        os.utime(path, (time.time() - 3600,) * 2)
    cache = IndexCache(str(tmp_path / "cache"))
    first = read(tmp_path / "train", cache)
    shutil.copy(tmp_path / "train" / "1.tar", tmp_path / "train" / "0.tar")
    with pytest.raises(BadImage, match="changed"):
        [first.encoded(i) for i in range(len(first))]
    with refused("duplicate_names"):
        read(tmp_path / "train", cache)


# ------------------------------------------------------------------------------------------------- splits

@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_val_are_taken_with_a_word(forms, tmp_path, name):
    (tmp_path / "train").symlink_to(forms["folders"] / "train")
    (tmp_path / name).symlink_to(forms["folders"] / "val")
    data = build_data(options(tmp_path), train=True, evaluate=True)
    assert len(data.val) == 20 and any(f"{name}/" in note and "no val/" in note for note in data.notes)


def test_a_part_held_back_is_the_same_in_every_form_and_in_no_training(forms, tmp_path):
    found = set()
    for form in ("folders", "tars", "tar per class"):
        (tmp_path / form).mkdir()
        (tmp_path / form / "train").symlink_to(forms[form] / "train")
        data = build_data(options(tmp_path / form, val_fraction=0.2, seed=len(form)), train=True, evaluate=True)
        train, val = ({(os.path.basename(part.path(i)), part.targets[i]) for i in range(len(part))} for part in (data.train, data.val))
        assert not train & val and len(train | val) == 144
        assert np.bincount([target for _, target in val])[::100].tolist() == [3] * 10
        found.add((frozenset(val), data.train.order, data.val.order))
        assert len(build_data(options(tmp_path / form, val_fraction=0.2), train=False, evaluate=True).val) == 30
    assert len(found) == 1
    assert len(build_data(options(forms["folders"], val_fraction=0.2), train=True, evaluate=True).train) == 144


# ------------------------------------------------------------------------------------------------- outages

def test_an_outage_of_the_data_is_waited_for_and_then_a_failure(forms, tmp_path, monkeypatch):
    here, away = tmp_path / "f", tmp_path / "away"
    shutil.copytree(forms["folders"], here)
    data = build_data(options(here), train=True, evaluate=False)
    expected = data.train.reader.encoded(0)

    def back_later():
        here.rename(away)
        threading.Timer(0.6, away.rename, [here]).start()

    def resumed():
        return build_data(options(here), train=True, evaluate=False, order=data.train.order).train.order

    back_later()
    assert data.train.reader.encoded(0) == expected
    monkeypatch.setattr("datasets.images.PATIENCE", 0.3)  # from what is read next
    back_later()
    assert resumed() == data.train.order
    shutil.rmtree(here)
    with pytest.raises(Failure) as error:
        list(make_loader(data.train, options(here, num_workers=1), [[(0, i, i) for i in range(4)]]))
    assert error.value.code == "data_lost" and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(Failure):  # of a run to resume; a new one is refused
        resumed()
    with refused("missing_data"):
        build_data(options(here), train=True, evaluate=False)
    reader = read(shutil.copytree(forms["parquet"] / "data", here))
    shutil.rmtree(here)
    with pytest.raises(Failure):
        reader.encoded(0)


@pytest.mark.parametrize("data_set, below", [("IMNET", ""), ("image_folder", "train")])
def test_a_disk_that_is_mounted_late_is_waited_for_by_a_run_that_resumes(forms, tmp_path, monkeypatch, data_set, below):
    order = build_data(options(forms["folders"]), train=True, evaluate=False).train.order

    def resumed():  # from a folder that is still empty
        return build_data(options(tmp_path, data_set=data_set), train=True, evaluate=False, order=order).train.order

    monkeypatch.setattr("datasets.images._patience", 0.3)
    with pytest.raises(Failure):
        resumed()
    late = ["mount", "--bind", str(forms["folders"] / below), str(tmp_path)]
    if subprocess.run(late, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    subprocess.run(["umount", late[-1]], check=True)
    monkeypatch.setattr("datasets.images._patience", 30.0)
    thread = threading.Timer(1, subprocess.run, [late])
    thread.start()
    try:
        assert resumed() == order
    finally:
        thread.join()
        subprocess.run(["umount", "-l", late[-1]], check=True)


def test_errors_that_may_pass_are_tried_again_and_others_not(tmp_path):
    errors = [OSError(errno.ESTALE, "once"), OSError(errno.EIO, "twice")]

    def answer():
        if errors:
            raise errors.pop()
        return b"data"
    assert retried(answer, str(tmp_path)) == b"data"
    with pytest.raises(FileNotFoundError):
        retried(lambda: os.stat(tmp_path / "none"), str(tmp_path))


# --------------------------------------------------------------------------------------- README's table of forms

ROWS = re.findall(r"^\| .* \| `(python [^`]*)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
# What the command of each row reports, in the order of the table.
REPORTED = ["class folders", "held back", "one folder", "tar files", "a tar per class", "WebDataset tars", "parquet",
            "order", "WebDataset tars", "class folders", "0 unreadable"]


def test_every_command_of_readmes_table_of_data_runs_as_pasted(forms, tmp_path, monkeypatch, capsys):
    for name in ("folders", "tars", "originals", "webdataset", "parquet"):
        (tmp_path / name).symlink_to(forms[name])
    for name in ("no_val", "flat/val"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "no_val" / "train").symlink_to(forms["folders"] / "train")
    with open(tmp_path / "flat" / "labels.csv", "w") as file:
        for path in (forms["folders"] / "val").glob("*/*"):
            shutil.copy(path, tmp_path / "flat" / "val")
            file.write(f"{path.name},{path.parent.name}\n")
    torch.save({"model": lively("hornet_pico_7x7", 1000).state_dict()}, tmp_path / "w.pth")
    monkeypatch.chdir(ROOT)
    for row, reported in zip(ROWS, REPORTED, strict=True):
        words, run = [*row.replace("/path/to", str(tmp_path)).split()[1:], "--index_cache", str(tmp_path / "cache")], tmp_path / "run"
        if words[0] == "main.py":
            training = {"global_batch": 72, "epochs": 1, "warmup_epochs": 0}
            more = {"resume": tmp_path / "w.pth"} if "--eval" in words else training
            code = main([*words[1:], *flags(num_workers=0, batch_size=36, output_dir=run, **more)])
            assert (run / ("eval.json" if "--eval" in words else "checkpoint-0.pth")).exists(), row
            shutil.rmtree(run)
        else:
            code = tool(words[2:])
        assert code == 0 and reported in "".join(capsys.readouterr()), row
