"""`--dry_run true` tries everything, names what is wrong in one sentence, and leaves nothing behind."""
import shutil
from types import SimpleNamespace

import pytest
import torch

from dryrun import DryRun, digest
from main import main
from tests.kits.docs import ROOT
from tests.kits.images import fill_folder
from tests.kits.processes import codes
from tests.kits.runs import start
from training import Trainer

QUICK = ["--model", "hornet_pico_7x7", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]
TRAIN = ("--batch_size", "2", "--epochs", "3", "--warmup_epochs", "0")


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for place in ("train/class000", "train/class001", "val/class000", "val/class001"):
        fill_folder(root / place, 5)
    return root


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """`run(data, *flags)` gives (exit code, the console's words on one line) of main.py in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(data, *flags):
        code = main([*QUICK, "--data_path", str(data), *flags])
        shown = capfd.readouterr()
        assert "Traceback" not in shown.err
        return code, " ".join((shown.out + shown.err).split())
    return started


def test_a_training_is_tried_and_leaves_no_trace(two_classes, tmp_path, run, monkeypatch):
    """Not even while its checkpoint is on the disk: then it may be killed."""
    load, seen = Trainer.load_state_dict, []
    monkeypatch.setattr(Trainer, "load_state_dict", lambda trainer, state: (
        seen.extend(tmp_path.iterdir()), load(trainer, state)))
    part_of_an_epoch = ("--batch_size", "1", "--mixup", "0", "--cutmix", "0")
    code, text = run(two_classes, *TRAIN, *part_of_an_epoch, "--model_ema", "true", "--model_ema_eval", "true",
                     "--output_dir", str(tmp_path / "mine"), "--dry_run", "true")
    assert code == 0 and {path.name for path in (*tmp_path.iterdir(), *seen)} <= {"cache"}, text
    for words in ("train: 10 images in 2 classes, class folders", "8 updates of 1 images", "read and restored", "img/s",
                  "% of the time", "3 epochs would take", "checkpoints take", "All is well"):
        assert words in text


def test_a_run_folder_is_read_and_not_changed_and_unreadable_images_are_named(two_classes, tmp_path, run):
    """They are a problem for an evaluation alone."""
    data, folder, hub = shutil.copytree(two_classes, tmp_path / "data"), tmp_path / "run", tmp_path / "hub"
    (data / "train/class000/1.JPEG").write_bytes(b"not an image")
    (data / "val/class001/2.JPEG").write_bytes(b"")
    hub.mkdir()
    (hub / "model.safetensors").touch()  # is no run's checkpoint, and is in nobody's way
    code, text = run(data, *TRAIN, "--output_dir", str(hub), "--auto_resume", "false", "--dry_run", "true")
    assert code == 0 and "train/class000/1.JPEG" in text and "val/class001/2.JPEG" in text, text
    start = (data, *TRAIN, "--output_dir", str(folder))
    assert run(*start, "--epochs", "1")[0] == 0

    def seen():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}
    before = seen()
    for flags, wanted, words in (
            ((), 0, (f"a start would resume {folder}", "5 updates of 2")),
            (("--epochs", "1"), 0, (f"find finished {folder}",)), (("--lr", "1e-4"), 2, ("lr 0.004",)),
            (("--eval", "true"), 2, ("val/class001/2.JPEG cannot be read", "--allow_bad_images")),
            (("--eval", "true", "--allow_bad_images", "true"), 0, ("of 10 sampled images", "10 images would take"))):
        code, text = run(*start, *flags, "--dry_run", "true")
        assert code == wanted and all(word in text for word in words), text
    assert seen() == before


@pytest.mark.parametrize("flags, word", [
    (("--data_path", "/nowhere"), "/nowhere/train"), (("--batch_size", "64"), "--batch_size"),
    (("--output_dir", str(ROOT / "main.py" / "run")), "main.py"), (("--eval", "true"), "--resume"),
    (("--lr", "1e30", "--min_lr", "1e30", "--clip_grad", "none"), "--lr")])
def test_what_is_wrong_is_one_sentence_and_exit_code_2(two_classes, run, flags, word):
    code, text = run(two_classes, *TRAIN, *flags, "--dry_run", "true")
    assert code == 2 and word in text and "All is well" not in text, text


def test_a_large_model_is_not_tried_on_a_cpu(two_classes, run):
    code, text = run(two_classes, *TRAIN, "--model", "hornet_tiny_7x7", "--dry_run", "true")
    assert code == 0 and "none: nothing more is tried on a CPU" in text and "gradient norm" not in text, text


def test_two_processes(two_classes, tmp_path):
    argv = [*QUICK, "--data_path", str(two_classes), *TRAIN, "--index_cache", str(tmp_path), "--dry_run", "true"]
    ranks = start(argv, tmp_path / "console", world_size=2)
    assert codes(ranks) == [0, 0]
    assert "2 on cpu" in " ".join(ranks[0].text().split())
    assert ["All is well" in rank.text() for rank in ranks] == [True, False]


def test_a_restore_that_leaves_something_out_is_found_and_the_first_problem_named_last(two_classes, run, monkeypatch):
    monkeypatch.setattr(Trainer, "load_state_dict", lambda self, state: None)
    code, text = run(two_classes, *TRAIN, "--dry_run", "true")
    assert code == 2 and "model differs after saving" in text.split("error: ")[1] and "more above, marked with !" in text, text


def test_a_disk_that_is_too_small_is_a_problem(two_classes, tmp_path, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 ** 6))
    code, text = run(two_classes, *TRAIN, "--output_dir", str(tmp_path / "run"), "--dry_run", "true")
    assert code == 2 and "1.0 MB" in text and "--save_ckpt_num" in text, text


def test_the_pace_leaves_out_the_first_update_and_the_waiting():
    trial = DryRun(SimpleNamespace(device=torch.device("cpu")), None)
    trial.seen = [(5.0, 4.0, 1.0)]
    assert trial.pace(10) == (10.0, 0.8)  # alone it counts
    trial.seen += [(6.0, 4.5, 1.0), (7.0, 5.0, 1.0)]
    assert trial.pace(10) == (20.0, 0.5)


def test_a_digest_sees_every_bit():
    state = {"a": torch.tensor([0.0, float("nan")]), "b": [1, {"c": 2.5}]}
    assert digest(state) == digest({**state, "a": state["a"].clone()})
    for other in ({"a": torch.tensor([-0.0, float("nan")])}, {"b": [1, {"c": 2.4}]}):
        assert digest({**state, **other}) != digest(state)
