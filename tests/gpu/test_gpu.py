"""What only a GPU can show. Each figure becomes a row of the table at the end of `make gpu`."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from benchmarks.cases import noise
from common.devices import float32_products
from common.errors import Failure, lacks_in_words
from models.zoo import MODEL_NAMES, VARIANTS
from tests.kits.fill import PARITY, parity_input
from tests.kits.processes import codes, environment, wait_for
from tests.kits.runs import EPOCHS, UPDATES, arguments, assert_equal_bits, now, result, start
from tests.kits.trained import filled
from tests.parity.test_trajectories import CASES, differing, train
from tests.unit.test_without_a_gpu import parts

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = dict(device="cuda", deterministic="true")


@pytest.mark.parametrize("name", MODEL_NAMES[:10])
def test_logits(name, figure):
    """In float32 those stored of the authors' code where there are some, else the CPU's; the other types near them."""
    stored = PARITY / "logits" / f"{name}_224x224.npz"
    images = torch.from_numpy(parity_input(2, 224, 224) if stored.exists() else parity_input(2, 64, 64))
    model = filled(name)
    with torch.no_grad(), float32_products():
        expected = np.load(stored)["logits"] if stored.exists() else model(images).numpy()
        model, images, scale = model.cuda(), images.cuda(), np.abs(expected).max()
        for dtype, limit in ((None, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)):
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                found = float(np.abs(model(images).float().cpu().numpy() - expected).max() / scale)
            figure(f"logits of {name} in {dtype or torch.float32}", found, f"< {limit} of the largest", found < limit)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['model']}-{c['update_freq']}x-{c['clip_mode']}")
def test_stored_trajectory(case, figure):
    with float32_products():
        losses, model, ema = train(case, "official" if case["clip_mode"] == "official" else "step", "cuda")
    worst = max(abs(a - b) for a, b in zip(losses, case["losses"]))
    figure(f"losses of a stored training, {case['model']}", worst, "< 1e-3", worst < 1e-3)
    assert not list(differing(model.state_dict(), case["weights"])) and not list(differing(ema.module.state_dict(), case["ema"]))


@pytest.mark.parametrize("options", [{}, {"mixup": 0.0, "cutmix": 0.0}, {"clip_by": "agc"}], ids=str)
def test_an_update_never_waits_for_the_device(options, figure):
    model = timm.create_model("hornet_tiny_gf", drop_path_rate=0.2).cuda().train()
    task, update = parts(model, torch.device("cuda"), update_freq=1, **options)
    images = noise(8, 64)
    for number in range(3):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one makes the optimizer's state
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = task.losses(model, images, number)[0]
            update.backward(loss)
            stats = update.step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    figure(f"updates without waiting {options or ''}", "2", "2, finite", math.isfinite(stats.loss.item()))


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(images, tmp_path, figure):
    whole = start(arguments(images, tmp_path / "whole", **ON_GPU), tmp_path / "console")
    assert codes(whole, 300) == [0], whole[0].text()
    at = [dict(phase="forward", update=UPDATES + 3, do="SIGTERM")]
    assert codes(start(arguments(images, tmp_path / "run", **ON_GPU), tmp_path / "1", at=at), 300) == [75]
    assert codes(start(arguments(images, tmp_path / "run", **ON_GPU), tmp_path / "2"), 300) == [0]
    assert_equal_bits(result(tmp_path / "whole"), result(tmp_path / "run"))
    figure("resumed run", f"{EPOCHS} epochs, equal bits", "equal bits")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_signals_with_nccl(name, figure):
    """NCCL may take a signal for itself. Ours is asked for after it has connected."""
    code = ("import os, signal, torch, torch.distributed as dist; from launch.stop import StopRequest\n"
            "with StopRequest(0) as stop:\n"
            "    dist.init_process_group('nccl', store=dist.HashStore(), rank=0, world_size=1)\n"
            f"    x = torch.ones(1, device='cuda'); dist.all_reduce(x); os.kill(os.getpid(), signal.{name})\n"
            "    dist.all_reduce(x); print(stop.requested, stop.reason, x.item()); dist.destroy_process_group()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    found, expected = done.stdout.strip() or done.stderr[-200:], f"True {name} 1.0"
    figure(f"{name} with NCCL", found, expected, found == expected)


def test_quickstart(tmp_path, figure):
    run = start(["--config", str(ROOT / "recipes" / "quickstart.yaml"), "--device", "cuda", "--output_dir", str(tmp_path)],
                tmp_path / "console")
    assert codes(run, 600) == [0], run[0].text()
    best = max(line["test_acc1"] for line in map(json.loads, (tmp_path / "log.txt").read_text().splitlines()))
    figure("quickstart, best top-1", best, ">= 95", best >= 95)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_stop_together_and_end_as_one_does(images, tmp_path, figure):
    argv = arguments(images, tmp_path / "run", update_freq=1, **ON_GPU | {"epochs": 1000})
    ranks = start(argv, tmp_path / "console", 2, now=str(tmp_path))
    wait_for(lambda: min(now(tmp_path, rank)[1] for rank in range(2)) > 8, 240)
    os.kill(ranks[1].pid, signal.SIGUSR2)
    figure("two processes, SIGUSR2 to one", str(codes(ranks, 120)), "[75, 75]", codes(ranks) == [75, 75])


def test_too_little_memory_is_one_sentence(figure):
    with pytest.raises(Failure, match="--batch_size") as caught, lacks_in_words():
        torch.empty(2 ** 44, device="cuda")
    figure("too little memory", caught.value.code, "device_memory", caught.value.code == "device_memory")


@pytest.mark.parametrize("name", MODEL_NAMES[:10])
def test_peak_memory(name, figure):
    """Of forward and backward of 32 images in bf16, above the weights."""
    torch.cuda.empty_cache()
    model, side = timm.create_model(name).cuda().train(), VARIANTS[name].input_size
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(torch.randn(32, 3, side, side, device="cuda"))
        out.float().square().mean().backward()
    except torch.OutOfMemoryError:
        pytest.skip(f"32 images of {side} pixels do not fit")
    figure(f"peak memory of {name}, 32 images of {side} pixels, bf16, GiB",
           (torch.cuda.max_memory_allocated() - before) / 2 ** 30, "")
