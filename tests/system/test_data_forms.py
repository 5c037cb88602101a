"""One set of real JPEGs in every form: the same global batches, also after a resume that changes the form, the
processes and the workers at once, and the same evaluation."""
import hashlib
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from common.synsets import imagenet_synsets
from config.parse import parse
from datasets.build import build_data
from main import main
from tests.kits import numbers
from tests.kits.batches import prepared
from tests.kits.docs import ROOT
from tests.kits.forms import FORMS, write_all
from tests.kits.images import jpeg
from tests.kits.options import data_options
from tests.kits.trained import lively
from tools.data import main as tool

CLASSES = [imagenet_synsets()[i] for i in range(0, 1000, 100)]
GLOBAL = 48


@pytest.fixture(scope="module", params=[144, pytest.param(2000, marks=pytest.mark.slow)])
def forms(request, tmp_path_factory):
    """So many training images and a tenth for evaluation in every form, in names of ImageNet's pattern."""
    tree = {"train": [], "val": []}
    for number in range(request.param):
        name = CLASSES[number % 10]
        tree["train"].append((name, f"{name}_{number * 7}.JPEG", jpeg(number, (40 + number % 9, 36))))
    for number in range(request.param // 10):
        tree["val"].append((CLASSES[number * 3 % 10], f"ILSVRC2012_val_{number + 1:08}.JPEG", jpeg(10 ** 6 + number)))
    return write_all(tmp_path_factory.mktemp("forms"), {part: sorted(rows) for part, rows in tree.items()})


def hashes(path, world: int = 1, workers: int = 0, first: int = 0) -> list[str]:
    """sha256 of each global batch of epoch 3 from update `first` on: images and targets as the network gets
    them, from all ranks."""
    options = data_options(data_set="IMNET", data_path=str(path), input_size=32, batch_size=GLOBAL // world, reprob=0.5,
                           num_workers=workers, allow_slow_parquet=True)
    updates = zip(*(values.split(GLOBAL) for values in prepared(options, world, epoch=3, start=first)))
    return [hashlib.sha256(images.numpy().tobytes() + targets.numpy().tobytes()).hexdigest() for images, targets in updates]


@pytest.fixture(scope="module")
def expected(forms):
    return hashes(forms["folders"])


@pytest.mark.parametrize("form", FORMS)
def test_global_batches_are_equal_in_every_form_on_1_2_and_3_processes(forms, expected, form):
    assert len(expected) == len(set(expected)) >= 3
    assert hashes(forms[form], world=2) == hashes(forms[form], world=3, workers=1) == expected
    assert hashes(forms[form], workers=2, first=1) == expected[1:]


@pytest.mark.slow
def test_a_resume_may_change_form_processes_and_workers_at_once(forms, tmp_path):
    def train(form, folder, processes, workers, stop_after):
        values = {"device": "cpu", "model": "hornet_pico_7x7", "input_size": 32, "epochs": 1, "global_batch": 12,
                  "batch_size": 12 // processes, "num_workers": workers, "data_path": forms[form], "output_dir": folder,
                  "index_cache": tmp_path / "cache", "disable_eval": "true", "allow_slow_parquet": "true",
                  "warmup_epochs": 0, "nb_classes": 10, "print_freq": 1}
        argv = [word for option, value in values.items() for word in (f"--{option}", str(value))]
        codes, seen = numbers.train(argv, tmp_path, processes, stop_after)
        assert codes == [75 if stop_after is not None else 0] * processes, numbers.console(tmp_path)
        return [update["batch"] for update in seen]

    if len(list((forms["folders"] / "train").rglob("*.JPEG"))) > 144:
        pytest.skip("the smaller set does")
    undisturbed = train("tars", tmp_path / "a", 1, 0, None)
    resumed = train("folders", tmp_path / "b", 1, 0, 2) + train("parquet", tmp_path / "b", 2, 1, 6) \
        + train("packed", tmp_path / "b", 3, 0, 8) + train("webdataset", tmp_path / "b", 2, 2, None)
    assert undisturbed == resumed and len(set(undisturbed)) == 12


@pytest.mark.slow
def test_hits_eval_json_and_predictions_are_the_same_from_every_form(forms, tmp_path):
    torch.save({"model": lively("hornet_pico_7x7", 1000).state_dict()}, tmp_path / "w.pth")
    found = {}
    for form, path in forms.items():
        folder = tmp_path / form.replace(" ", "_")
        assert main(["--eval", "true", "--resume", str(tmp_path / "w.pth"), "--data_path", str(path), "--model",
                     "hornet_pico_7x7", "--input_size", "32", "--device", "cpu", "--num_workers", "0", "--batch_size", "8",
                     "--output_dir", str(folder), "--report", str(folder), "--index_cache", str(tmp_path / "cache")]) == 0
        result = json.loads((folder / "eval.json").read_text())
        with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
            found[form] = result, {name: stored[name] for name in stored.files if name != "path"}
    plain, plain_arrays = found["folders"]
    for form, (result, arrays) in found.items():
        # Parquet is read in its own order, so its last batch is another, and float32 ends in other last bits.
        exact = form != "parquet"
        different = {name for name in plain if result[name] != plain[name] and (exact or result[name] != pytest.approx(
            plain[name], rel=1e-5))}
        assert different <= {"seconds", "images_per_second"}, (form, different)
        assert arrays.keys() == plain_arrays.keys()
        for name, values in arrays.items():
            close = np.array_equal if exact or values.dtype.kind != "f" else partial(np.allclose, rtol=1e-4, atol=1e-6)
            assert close(values, plain_arrays[name]), (form, name)


# --------------------------------------------------------------------------------------- README's table of forms

ROWS = re.findall(r"^\| .* \| `(python [^`]*)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_every_command_of_readmes_table_of_data_runs_as_pasted(forms, tmp_path, monkeypatch):
    assert len(ROWS) == 11
    places = {"folders": "folders", "tars": "tars", "originals": "originals", "webdataset": "webdataset",
              "parquet": "parquet", "no_val/train": "folders/train"}
    (tmp_path / "no_val").mkdir()
    for name, place in places.items():
        (tmp_path / name).symlink_to(forms["folders"].parent / place)
    (tmp_path / "flat" / "val").mkdir(parents=True)
    lines = []
    for path in (forms["folders"] / "val").glob("*/*"):
        shutil.copy(path, tmp_path / "flat" / "val")
        lines.append(f"{path.name},{path.parent.name}\n")
    (tmp_path / "flat" / "labels.csv").write_text("".join(lines))
    monkeypatch.chdir(ROOT)
    for row in ROWS:
        words = row.replace("/path/to", str(tmp_path)).split()[1:]
        if words[:2] == ["-m", "tools.data"]:
            assert tool([*words[2:], "--index_cache", str(tmp_path / "cache")]) == 0
        else:
            values = parse([*words[1:], "--index_cache", str(tmp_path / "cache")]).options
            data = build_data(values, train=not values.eval, evaluate=True)
            assert len(data.val) >= 10 and (values.eval or len(data.train) >= 100) and data.num_classes == 1000
