"""The same run on any number of processes, built from the options as main.py builds it."""
import os
from pathlib import Path

import pytest
import torch

import main
from tests.kits.images import write_images
from tests.kits.processes import Child, codes, environment, places
from tests.kits.runs import arguments, result, start

GLOBAL_BATCH, UPDATES, ACCUMULATIONS = 32, 3, (1, 2, 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=UPDATES * GLOBAL_BATCH + 5)


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
