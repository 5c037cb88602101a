"""A run saves all that resuming it needs, before anything can fail, and never starts from scratch in
silence."""
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
from dryrun import digest
from launch.process import Process
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from plan import Classification, plan_run
from run.checkpoint import Checkpoints, load, snapshot
from run.start import code_version
from run.state import TABLE, check_resumable, check_same_run, collect
from tests.kits.faults import Place, command, start
from tests.kits.images import write_images
from training import Trainer

UPDATES, STOP_AFTER, TIMES = 6, 8, ("seconds", "train_images_per_second", "train_data_wait")
OPTIONS = {"model": "hornet_pico_7x7", "device": "cpu", "input_size": 32, "epochs": 2, "batch_size": 4,
           "lr": 0.01, "warmup_epochs": 0, "layer_scale_init_value": 0.5, "mixup": 0, "cutmix": 0,
           "aa": "none", "reprob": 0, "model_ema": "true", "model_ema_decay": 0.9, "num_workers": 0}


@pytest.fixture(scope="module")
def process():
    return Process(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "data", train=4 * UPDATES)


def options(images, **changes):
    values = OPTIONS | {"data_path": images, "index_cache": images / "cache"} | changes
    return parse([word for name, value in values.items() for word in (f"--{name}", str(value))])


class Poisoned(Trainer):
    """The loss of update 2 is infinite; the run is asked to stop after `stop_after`. Losses are scaled as for
    fp16."""
    stop_after = -1

    def load_state_dict(self, state, *names):
        self.loop.update.scaler.enabled = True
        super().load_state_dict(state, *names)

    def on_phase(self, phase, update):
        super().on_phase(phase, update)
        criterion = torch.nn.CrossEntropyLoss()
        more = float("inf") if update == 2 else 0
        self.task.criterion = lambda logits, targets: criterion(logits, targets) + more

    def after_update(self, update, stats, sums):
        if update == self.stop_after:
            self.stop.request("the test")
        return super().after_update(update, stats, sums)


def trainer(resolved, process, folder, state=None):
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_run(resolved, process, state)
    return Poisoned(Classification(plan, process, state), plan, process, stop=StopRequest(), state=state,
                    folder=Ledger(folder), watchdog=Watchdog(process, hang_timeout=0))


@pytest.fixture(scope="module")
def paused(images, process, tmp_path_factory):
    """The state of a run that was stopped in its second epoch, as if it came from elsewhere."""
    run = trainer(options(images), process, tmp_path_factory.mktemp("paused"))
    run.stop_after, run.loop.update.scaler.enabled = STOP_AFTER, True
    assert run.fit() is Outcome.PAUSED
    run.close()
    state = snapshot(run.state_dict())
    assert state["policy"]["skipped"] == 1 and state["scaler"] and state["sums"]
    check_resumable(state, "paused")
    return state | {"version": "of another day", "threads": torch.get_num_threads() + 1, "order": "another",
                    "kernels": "another machine",
                    "code_paths": {"kernels": "plain", "linear": "default", "allocator": "default"}}


def plain(value):
    """Something that compares to the bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.cpu().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def outcome_of(call):
    try:
        call()
        return "accepted"
    except UserError as error:
        return error.code


def observe(state, images, process, folder, caplog):
    """All that a person could see of a run that is resumed from `state` in another environment, with an image
    more, or with others."""
    more, other = images.parent / "more", images.parent / "other"
    if not more.exists():
        shutil.copytree(images, more)
        shutil.copy(min((more / "train" / "class0").iterdir()), more / "train" / "class0" / "another.png")
        shutil.copytree(images, other)
        for part in ("train", "val"):
            (other / part / "class0").rename(other / part / "zebra")
    threads, resolved = torch.get_num_threads(), options(more, update_freq=2)
    args = resolved.to_dict() | {"lr": 1.0}
    seen = {"another learning rate": outcome_of(lambda: check_same_run(state, args, "")),
            "other classes": outcome_of(lambda: plan_run(options(other), process, state))}
    caplog.clear()
    try:
        check_resumable(state, "paused")
        run = trainer(resolved, process, folder / "run", snapshot(state))  # it becomes the optimizer's own
        seen["threads"] = torch.get_num_threads()
        assert run.fit() is Outcome.DONE
        run.close()
    except UserError as error:
        return seen | {"refused": error.code}
    finally:
        torch.set_num_threads(threads)
    line = read_json_lines(folder / "run" / "log.txt")[-1]
    return seen | {"state": {name: plain(part.state_dict()) for name, part in run.parts.items()},
        "log": {name: value for name, value in line.items() if name not in TIMES and not name.endswith("_share")},
        "events": [event["message"] for event in read_json_lines(folder / "run" / "events.jsonl")],
        "notices": [any(words in record.getMessage() for record in caplog.records)
                    for words in (code_version(), "another machine")]}


_reference = {}


@pytest.mark.parametrize("row", [None, *TABLE])
def test_a_resumed_run_needs_every_row_of_the_table(row, paused, images, process, tmp_path, logged,
                                                    monkeypatch):
    if not _reference:
        _reference.update(observe(paused, images, process, tmp_path / "reference", logged))
        assert "refused" not in _reference and len(_reference["events"]) == 1 and all(_reference["notices"])
    if row is not None:
        monkeypatch.delitem(TABLE, row)
    state = {name: value for name, value in paused.items() if name != row}
    seen = observe(state, images, process, tmp_path / "seen", logged)
    assert (seen == _reference) is (row is None), f"nobody would notice that checkpoints lack {row}"


@pytest.mark.parametrize("name", ["position", "model", "model_ema", "optimizer", "scaler", "policy", "setup"])
def test_a_part_without_state_dict_cannot_be_saved(name, images, process, tmp_path):
    run = trainer(options(images), process, tmp_path / "run")
    assert set(run.state_dict()) == {"format", *TABLE} and name in run.parts
    with pytest.raises(AttributeError):
        collect(run.parts | {name: object()})
    run.close()


# ---------------------------------------------------------------------------------- around a run, from the
# command line

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
    lines = read_json_lines(folder / "attempts.jsonl")
    return [line["from_update"] for line in lines if "from_update" in line]


def test_an_evaluation_that_fails_leaves_the_epoch_saved(place, capfd, monkeypatch):
    def evaluate(*_):
        raise UserError("the image cannot be read", code="unreadable_image")
    monkeypatch.setattr(Classification, "evaluate", evaluate)
    run(place, capfd, code=2)
    assert [path.name for path in Checkpoints(place.run).numbered()] == ["checkpoint-e0u2.pth"]
    monkeypatch.undo()
    run(place, capfd)
    assert begun_at(place.run) == [0, 2] and (place.run / "checkpoint-0.pth").exists()


def test_unreadable_files_are_one_incident_each_per_run(place, capfd):
    bad = {str(place.data / part / "cat" / "1.JPEG") for part in ("train", "val")}
    for path in bad:
        Path(path).write_bytes(b"no image")
    run(place, capfd, "--epochs 2")
    run(place, capfd, "--epochs 3")
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


def test_as_many_images_that_came_as_went_are_reported(place, capfd):
    run(place, capfd)
    image = place.data / "train" / "cat" / "1.JPEG"
    run(place, capfd, "--epochs 2")
    assert not events(place, "images_changed")
    image.rename(image.with_name("9.JPEG"))
    os.utime(image.parent)
    text = run(place, capfd, "--epochs 3")
    assert len(events(place, "images_changed")) == 1 and "restore the data set" in text


def test_frozen_parts_are_as_they_began_and_the_run_resumes_to_the_same_bits(place, capfd):
    run(place, capfd)
    began = load(place.run / "checkpoint-0.pth").state["model"]
    whole, again = place.here / "whole", place.here / "again"
    flags = ("--freeze stem,stages.0-2 --finetune {run}/checkpoint-0.pth --layer_decay 0.5 --weights model --model_ema true "
             "--drop_path 0.5 --epochs 2 --output_dir ")
    run(place, capfd, flags + str(whole))
    again.mkdir()
    for path in whole.glob("checkpoint-0.pth*"):
        shutil.copy(path, again)
    run(place, capfd, flags + str(again))
    one, other = (load(folder / "checkpoint-1.pth").state for folder in (whole, again))
    assert begun_at(again) == [2] and digest(one["model"]) == digest(other["model"])
    assert digest(one["optimizer"]) == digest(other["optimizer"]) and digest(one["model_ema"]) == digest(other["model_ema"])
    moved = {name for name, value in one["model"].items() if not torch.equal(value, began[name])}
    assert moved == {name for name in began if name.startswith(("downsample_layers.3", "stages.3", "norm", "head"))}
    assert len(one["optimizer"]["state"]) == len(moved)
    assert all(torch.equal(one["model_ema"][name], began[name]) for name in began.keys() - moved)
    run(place, capfd, "--freeze backbone", code=2)


def test_more_epochs_on_resuming_move_the_learning_rate_and_that_is_reported(place, capfd):
    run(place, capfd, "--epochs 2")
    text = run(place, capfd, "--epochs 9")
    assert text.count("--epochs 9 instead of 2") == 1 and begun_at(place.run) == [0, 4]


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


def test_a_checkpoint_with_a_broken_entry_is_one_sentence(place, capfd):
    run(place, capfd)
    state = load(place.run / "checkpoint-0.pth").state
    slots = state["optimizer"]["state"]
    broken = [{"state": slots | {0: slots[0] | {"exp_avg": value}}} for value in (
        None, torch.zeros(1, 1, 1, 1), torch.zeros(2).to_sparse())]
    broken += [{"state": {0: 1}}, {"param_groups": []}, {"param_groups": [{"params": [[]]}]}, {"param_groups": [1]}]
    changes = [{"policy": {"row": None}}, *({"optimizer": state["optimizer"] | each} for each in broken)]
    for number, change in enumerate(changes):
        torch.save(state | change, place.here / "odd.pth")
        flags = f"--epochs 2 --output_dir {{here}}/other{number} --resume {{here}}/odd.pth"
        assert next(iter(change)) in run(place, capfd, flags, code=2).splitlines()[-1], change
