"""A run saves all that resuming it needs, before anything can fail, and never starts from scratch in
silence."""
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import read_json_lines
from common.ledger import Ledger
from common.outcome import Outcome
from config.parse import parse
from datasets import images as disk
from dryrun import digest
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from plan import Classification, plan_run
from run.checkpoint import Checkpoints, load, snapshot
from run.folder import RunFolder
from run.start import code_version
from run.state import TABLE, check_resumable, check_same_run, collect
from tests.kits.errors import refused
from tests.kits.faults import Place, command, start
from tests.kits.programs.hooked_main import hooked
from tests.kits.runs import UPDATES, arguments, result
from tests.kits.toy import Alone
from training import Trainer

# In the second epoch a loss is infinite, and the run is asked to stop.
STOPPED = hooked(Trainer, {"at": [{"phase": "forward", "update": UPDATES + 1, "do": "infinite_loss"},
                                  {"phase": "forward", "update": UPDATES + 2, "do": "SIGUSR1"}]})


def options(data, **changes):
    """Of two epochs, with a loss scale."""
    return parse(arguments(data, None, epochs=2, warmup_epochs=0, mixup=0, cutmix=0, use_amp="true", amp_dtype="fp16",
                           model_ema_eval="false", output_dir=None, **changes))


def trainer(kind, resolved, folder, stop, state=None):
    folder.mkdir(parents=True)
    plan, process = plan_run(resolved, Alone(), state), Alone()
    return kind(Classification(plan, process, state), plan, process, stop=stop, state=state, folder=Ledger(folder),
                watchdog=Watchdog(process, hang_timeout=0))


@pytest.fixture(scope="module")
def paused(images, tmp_path_factory):
    """The state of a run that was stopped in its second epoch, as if it came from elsewhere."""
    with StopRequest() as stop:
        run = trainer(STOPPED, options(images), tmp_path_factory.mktemp("paused") / "run", stop)
        assert run.fit() is Outcome.PAUSED
    run.close()
    state = snapshot(run.state_dict())
    assert state["policy"]["skipped"] == 1 and state["scaler"] and state["sums"]
    check_resumable(state, "paused")
    return state | {"version": "of another day", "threads": torch.get_num_threads() + 1, "order": "another",
                    "kernels": "another machine",
                    "code_paths": {"kernels": "plain", "linear": "default", "allocator": "default"}}


@pytest.fixture(scope="module")
def others(images, tmp_path_factory):
    """The images with one more, and with a class of another name."""
    folder = tmp_path_factory.mktemp("others")
    more, renamed = (shutil.copytree(images, folder / name) for name in ("more", "renamed"))
    shutil.copy(more / "train/class0/000.png", more / "train/class0/another.png")
    for part in ("train", "val"):
        (renamed / part / "class0").rename(renamed / part / "zebra")
    return more, renamed


def observe(state, others, folder, caplog):
    """All that a person could see of a run that is resumed from `state` in another environment, with an image
    more, or with others."""
    threads, resolved = torch.get_num_threads(), options(others[0], update_freq=1)
    seen = {"differences": check_same_run(state, resolved.to_dict() | {"lr": 1.0}, "", explicit=True)}
    try:
        plan_run(options(others[1]), Alone(), state)
    except UserError as error:
        seen["other classes"] = error.code
    caplog.clear()
    try:
        check_resumable(state, "paused")
        run = trainer(Trainer, resolved, folder, StopRequest(), snapshot(state))  # it becomes the optimizer's own
        seen["threads"] = torch.get_num_threads()
        assert run.fit() is Outcome.DONE
        run.close()
    except UserError as error:
        return seen | {"refused": error.code}
    finally:
        torch.set_num_threads(threads)
    return seen | {"log": result(folder)["log"], "state": {
            name: digest(part.state_dict()) for name, part in run.parts.items()},
        "events": [event["message"] for event in read_json_lines(folder / "events.jsonl")],
        "notices": [any(words in record.getMessage() for record in caplog.records)
                    for words in (code_version(), "another machine")]}


_reference = {}


@pytest.mark.parametrize("row", [None, *TABLE])
def test_a_resumed_run_needs_every_row_of_the_table(row, paused, others, tmp_path, logged, monkeypatch):
    if not _reference:
        _reference.update(observe(paused, others, tmp_path / "reference", logged))
        assert "refused" not in _reference and len(_reference["events"]) == 1 and all(_reference["notices"])
        assert _reference["log"][-1]["nonfinite_updates"] == 1  # those before the stop are still counted
    if row is not None:
        monkeypatch.delitem(TABLE, row)
    state = {name: value for name, value in paused.items() if name != row}
    seen = observe(state, others, tmp_path / "seen", logged)
    assert (seen == _reference) is (row is None), f"nobody would notice that checkpoints lack {row}"


def test_a_part_without_state_dict_cannot_be_saved(images, tmp_path):
    run = trainer(Trainer, options(images), tmp_path / "run", StopRequest())
    assert set(run.state_dict()) == {"format", *TABLE}
    for name in run.parts:
        with pytest.raises(AttributeError):
            collect(run.parts | {name: object()})
    run.close()


def test_an_optimizer_state_that_does_not_fit_is_refused(images, paused, tmp_path):
    for name, odd in {"state": {0: 1}, "param_groups": [1]}.items():
        with refused("invalid_checkpoint", "--opt adamw"):
            trainer(Trainer, options(images), tmp_path / name, StopRequest(), paused | {
                "optimizer": paused["optimizer"] | {name: odd}})


# ---------------------------------------------------------------------- around a run, from the command line

@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    made.images()
    return made


def run(place, capfd, flags="", code=0):
    """What a person reads of a training of one epoch (two updates), changed by `flags`."""
    found, text = start(command("train", flags, place), capfd)
    assert found == code and "Traceback" not in text, text
    return text


def events(place, kind):
    return [event for event in read_json_lines(place.run / "events.jsonl") if event["kind"] == kind]


def begun_at(folder):
    """The updates at which the attempts in a run folder began."""
    return [attempt["from_update"] for attempt in Ledger(folder).attempts()]


def test_an_evaluation_that_fails_leaves_the_epoch_saved(place, capfd, monkeypatch):
    def evaluate(*_):
        raise UserError("the image cannot be read", code="unreadable_image")
    monkeypatch.setattr(Classification, "evaluate", evaluate)
    run(place, capfd, code=2)
    assert [path.name for path in Checkpoints(place.run).numbered()] == ["checkpoint-e0u2.pth"]
    monkeypatch.undo()
    run(place, capfd)
    assert begun_at(place.run) == [0, 2] and (place.run / "checkpoint-0.pth").exists()
    assert not events(place, "images_changed")


def test_what_is_different_or_unreadable_is_reported_once(place, capfd):
    """An image that came for one that went, more epochs, and files that were bad from the beginning on."""
    bad = {str(place.data / part / "cat" / "1.JPEG") for part in ("train", "val")}
    for path in bad:
        Path(path).write_bytes(b"no image")
    run(place, capfd, "--epochs 2")
    image = place.data / "train" / "cat" / "2.JPEG"
    image.rename(image.with_name("9.JPEG"))
    os.utime(image.parent)
    text = run(place, capfd, "--epochs 5")
    assert text.count("--epochs 5 instead of 2") == 1 and begun_at(place.run) == [0, 4]
    assert len(events(place, "images_changed")) == 1 and "restore the data set" in text
    found = [path for event in events(place, "unreadable_image") for path in event["images"]]
    assert sorted(found) == sorted(bad)


def test_a_requeued_command_resumes_again_what_it_began_from_while_its_own_folder_has_nothing(place, capfd):
    run(place, capfd)
    flags = "--epochs 2 --output_dir {here}/other --resume {run}/checkpoint-0.pth"
    run(place, capfd, flags)
    for path in Path(place.here, "other").glob("checkpoint-*"):
        path.unlink()
    run(place, capfd, flags)
    assert begun_at(place.here / "other") == [2, 2]


def test_frozen_parts_are_as_they_began_and_the_run_resumes_to_the_same_bits(place, capfd):
    run(place, capfd)
    began = load(place.run / "checkpoint-0.pth").state["model"]
    whole, again = place.here / "whole", place.here / "again"
    flags = ("--freeze stem,stages.0-2 --finetune {run}/checkpoint-0.pth --layer_decay 0.5 --weights model --model_ema true "
             "--drop_path 0.5 --epochs 2 --output_dir ")
    run(place, capfd, flags + str(whole))
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("checkpoint-1.*", "checkpoint-e1*"))
    run(place, capfd, flags + str(again))
    one, other = (load(folder / "checkpoint-1.pth").state for folder in (whole, again))
    assert begun_at(again) == [0, 2]
    for part in ("model", "optimizer", "model_ema"):
        assert digest(one[part]) == digest(other[part])
    moved = {name for name, value in one["model"].items() if not torch.equal(value, began[name])}
    assert moved == {name for name in began if name.startswith(("downsample_layers.3", "stages.3", "norm", "head"))}
    assert len(one["optimizer"]["state"]) == len(moved)
    assert all(torch.equal(one["model_ema"][name], began[name]) for name in began.keys() - moved)


def test_where_only_best_files_are_left_the_newest_of_them_is_resumed_and_a_damaged_one_stops(place, capfd):
    run(place, capfd)
    for path in Checkpoints(place.run).numbered():
        path.unlink()
    best = place.run / "checkpoint-best.pth"
    content = best.read_bytes()
    best.write_bytes(b"")
    run(place, capfd, "--epochs 2", code=2)
    best.write_bytes(content)
    (place.run / "latest.pth").symlink_to("gone")  # as some programs make it: nothing of ours, and ignored
    run(place, capfd, "--epochs 2 --auto_resume false", code=2)
    run(place, capfd, "--epochs 2")
    assert begun_at(place.run) == [0, 2]


def test_a_roll_back_while_the_folder_does_not_answer_is_one_sentence(place, capfd, monkeypatch):
    def lost(*_):
        raise OSError(errno.EIO, "Input/output error")

    def roll_back(self):
        monkeypatch.setattr(RunFolder, "is_ours", lost)
        rolled_back(self)
    rolled_back = Trainer.roll_back
    monkeypatch.setattr(Trainer, "roll_back", roll_back)
    monkeypatch.setattr(disk, "PATIENCE", 0.1)
    monkeypatch.setattr(disk, "_patience", 0.1)
    text = run(place, capfd, "--lr 1e9 --epochs 3", code=1)
    assert f"{place.run} cannot be read" in text.splitlines()[-1]
