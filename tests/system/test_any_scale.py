"""The same run on any number of processes, built from the options as main.py builds it."""
import os

import pytest
import torch

from common.outcome import Outcome
from config.parse import parse
from launch.process import start as start_process
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from plan import Classification, plan_run
from tests.kits.images import write_images
from tests.kits.processes import FORKS, codes, environment, places
from tests.kits.runs import arguments, result, start
from training import Trainer

GLOBAL_BATCH, UPDATES, ACCUMULATIONS = 32, 3, (1, 2, 4)


class Recorded(Trainer):
    """Notes the learning rates and weight decays of every update."""
    schedule = ()

    def after_update(self, update, stats, sums):
        groups = self.loop.update.optimizer.param_groups
        self.schedule = [*self.schedule, (update, [(group["lr"], group["weight_decay"]) for group in groups])]
        return super().after_update(update, stats, sums)


def train_in_double(data, accumulation: int, process) -> dict:
    """What an epoch in float64 leaves, on `process` among its peers."""
    size = GLOBAL_BATCH // accumulation // process.world_size
    argv = arguments(data, "", batch_size=size, update_freq=None, global_batch=GLOBAL_BATCH, epochs=1,
                     warmup_epochs=0, disable_eval="true", output_dir=None)
    planned = plan_run(parse(argv), process, None)
    assert planned.batch.update_freq == accumulation and planned.updates_per_epoch == UPDATES
    plain_wrap = type(process).wrap
    process.wrap = lambda model: plain_wrap(process, model.double())
    with StopRequest() as stop:
        run = Recorded(Classification(planned, process), planned, process, stop=stop,
                       watchdog=Watchdog(process, hang_timeout=0))
        run.ema.module.double()
        prepare = run.task.prepare

        def in_double(batch):
            images, targets = prepare(batch)
            return images.double(), targets.double()

        run.task.prepare = in_double
        assert run.fit() is Outcome.DONE
    state = run.state_dict()
    return {"model": state["model"], "model_ema": state["model_ema"], "schedule": run.schedule,
            "update": state["update"]}


def worker(data, folder, place: dict) -> None:
    os.environ.clear()
    os.environ.update(environment(**place))
    torch.set_num_threads(1)
    with start_process("cpu") as process:
        for accumulation in ACCUMULATIONS:
            torch.manual_seed(process.rank + 100 * accumulation)  # nothing may depend on the global generator
            found = train_in_double(data, accumulation, process)
            torch.save(found, folder / f"{process.world_size}-{accumulation}-{process.rank}.pth")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=UPDATES * GLOBAL_BATCH + 5)


@pytest.fixture(scope="module")
def results(images, tmp_path_factory):
    """{(processes, accumulation, rank): what was left}, made once per number of processes."""
    folder, found = tmp_path_factory.mktemp("results"), {}

    def of(world_size: int) -> dict:
        if not any(size == world_size for size, _, _ in found):
            ranks = [FORKS.Process(target=worker, args=(images, folder, place))
                     for place in places(world_size)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(240)
                rank.kill()
            assert [rank.exitcode for rank in ranks] == [0] * world_size
            for path in folder.glob(f"{world_size}-*.pth"):
                found[tuple(map(int, path.stem.split("-")))] = torch.load(path, weights_only=True)
        return {key: value for key, value in found.items() if key[0] == world_size}
    return of


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_and_schedules_are_those_of_one_process_without_accumulation(results, world_size):
    whole, split = results(1)[1, 1, 0], results(world_size)
    assert len(whole["schedule"]) == whole["update"] == UPDATES
    assert sorted(split) == [(world_size, a, rank) for a in ACCUMULATIONS for rank in range(world_size)]
    for case, found in split.items():
        assert found["schedule"] == whole["schedule"], case
        for part in ("model", "model_ema"):
            for name, value in whole[part].items():
                assert value.dtype == torch.float64
                difference = (found[part][name] - value).abs().max().item()
                assert difference < 1e-10, (case, part, name, difference)


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_with_the_global_batch(images, tmp_path, before, after):
    kept = dict(batch_size=8, update_freq=4 // before, warmup_epochs=0, epochs=2)
    whole = tmp_path / "whole"
    assert set(codes(start(arguments(images, whole, **kept), tmp_path / "console0", before))) == {0}
    folder = tmp_path / "run"
    at = dict(phase="step", update=UPDATES, do="SIGUSR1")
    assert codes(start(arguments(images, folder, **kept), tmp_path / "console1", before,
                       at=[at])) == [75] * before
    ranks = start(arguments(images, folder, **kept), tmp_path / "console2", after)
    assert codes(ranks) == [0] * after, ranks[0].text()
    said = [line for line in ranks[0].text().splitlines() if "global batch of 32 is kept" in line]
    assert len(said) == 1 and f"x {4 // after} forward pass" in said[0]
    one, other = result(whole), result(folder)
    assert other["global_batch"] == 32 and other["update"] == one["update"] == 2 * UPDATES
    for part in ("model", "model_ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-3, atol=1e-4,
                                       msg=lambda m: f"{name}: {m}")
    for a, b in zip(one["log"], other["log"], strict=True):
        # Pictures are weighed alike in an epoch's means, whatever number of processes saw them.
        assert {k: v for k, v in b.items() if v is not None} == pytest.approx(
            {k: v for k, v in a.items() if v is not None}, rel=1e-3)
