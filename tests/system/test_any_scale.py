"""The same run on any number of processes, built from the options as main.py builds it."""
import os
from pathlib import Path

import pytest
import torch

import main
from common.outcome import Outcome
from config.parse import parse
from launch.stop import StopRequest
from launch.watchdog import Watchdog
from plan import Classification, plan_run
from tests.kits.images import write_images
from tests.kits.processes import Child, codes, environment, in_processes, places
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
    torch.manual_seed(process.rank + 100 * accumulation)  # nothing may depend on the global generator
    size = GLOBAL_BATCH // accumulation // process.world_size
    argv = arguments(data, "", batch_size=size, update_freq=None, global_batch=GLOBAL_BATCH, epochs=1,
                     warmup_epochs=0, disable_eval="true", output_dir=None)
    planned = plan_run(parse(argv), process, None)
    assert planned.batch.update_freq == accumulation and planned.batch.updates_per_epoch == UPDATES
    plain_wrap = type(process).wrap
    process.wrap = lambda model: plain_wrap(process, model.double())
    with StopRequest() as stop:
        run = Recorded(Classification(planned, process), planned, process, stop=stop,
                       watchdog=Watchdog(process, hang_timeout=0))
        run.ema.module.double()
        prepare = run.task.prepare
        run.task.prepare = lambda batch: tuple(
            part.double() if part.is_floating_point() else part for part in prepare(batch))
        assert run.fit() is Outcome.DONE
    state = run.state_dict()
    return {"model": state["model"], "model_ema": state["model_ema"], "schedule": run.schedule,
            "update": state["update"]}


def train_each(process, data) -> dict[int, dict]:
    return {accumulation: train_in_double(data, accumulation, process) for accumulation in ACCUMULATIONS}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=UPDATES * GLOBAL_BATCH + 5)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """What one process leaves, for each accumulation."""
    return in_processes(train_each, 1, tmp_path_factory.mktemp("one"), images)[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_and_schedules_are_those_of_one_process_without_accumulation(whole, images, tmp_path, world_size):
    assert len(whole[1]["schedule"]) == whole[1]["update"] == UPDATES
    for found in [whole] if world_size == 1 else in_processes(train_each, world_size, tmp_path, images):
        for accumulation in ACCUMULATIONS:
            assert found[accumulation]["schedule"] == whole[1]["schedule"]
            for part in ("model", "model_ema"):
                assert all(value.dtype == torch.float64 for value in found[accumulation][part].values())
                torch.testing.assert_close(found[accumulation][part], whole[1][part], rtol=0, atol=1e-10)


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_with_the_global_batch(images, tmp_path, before, after):
    whole, folder, ended = tmp_path / "whole", tmp_path / "run", []
    stop = dict(phase="step", update=UPDATES, do="SIGUSR1")
    for out, count, at in ((whole, before, []), (folder, before, [stop]), (folder, after, [])):
        argv = arguments(images, out, batch_size=8, update_freq=4 // before, warmup_epochs=0, epochs=2)
        ranks = start(argv, tmp_path / f"console{len(ended)}", count, at=at)
        ended.append(codes(ranks))
    assert ended == [[0] * before, [75] * before, [0] * after], ranks[0].text()
    said = [line for line in ranks[0].text().splitlines() if "global batch of 32 is kept" in line]
    assert len(said) == 1 and f"x {4 // after} forward pass" in said[0]
    one, other = result(whole), result(folder)
    assert other["global_batch"] == 32 and other["update"] == one["update"] == 2 * UPDATES
    for part in ("model", "model_ema"):
        torch.testing.assert_close(other[part], one[part], rtol=1e-3, atol=1e-4)
    for a, b in zip(one["log"], other["log"], strict=True):
        # Images are weighed alike in an epoch's means, whatever number of processes saw them.
        known = {name: value for name, value in a.items() if value is not None}
        assert {name: b[name] for name in known} == pytest.approx(known, rel=1e-3)


def on_another_machine(argv: list[str], threads_after: str) -> int:
    """main.py as rank 1 on a node without compiled kernels, with an older CPU and another number of threads."""
    os.environ.update(HORNET_NATIVE="0", ATEN_CPU_CAPABILITY="default")  # read at first use
    torch.set_num_threads(3)
    code = main.main(argv)
    Path(threads_after).write_text(str(torch.get_num_threads()))
    return code


def test_a_rank_on_another_machine_takes_rank_0s_threads_and_is_named_where_bits_will_differ(images, tmp_path):
    argv = arguments(images, tmp_path / "run", epochs=1, batch_size=16, update_freq=1)
    first, other = (environment(**place) for place in places(2))
    ranks = [Child(main.main, (argv,), first, tmp_path / "console.0"),
             Child(on_another_machine, (argv, str(tmp_path / "threads")), other, tmp_path / "console.1")]
    assert codes(ranks) == [0, 0], [rank.text() for rank in ranks]
    [notice] = [line for line in ranks[0].text().splitlines() if "on rank 1 (" in line]
    assert "kernels is " in notice and "DEFAULT on rank 1" in notice
    saved = result(tmp_path / "run")
    assert int((tmp_path / "threads").read_text()) == saved["threads"] == 1
    assert ("kernels=compiled" in ranks[1].text()) == (saved["code_paths"]["kernels"] == "compiled")
