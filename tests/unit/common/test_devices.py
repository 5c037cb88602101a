"""float32's precision, for each way a run can ask for it; clocks, copies and choices of devices that are not here."""
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import engine
from common import devices
from common.devices import PhaseClock, dense_peak, float32_products, float32_settings, set_float32
from config.options import ImageSettings, Options
from datasets import device as device_room
from dryrun import largest
from launch.process import BACKENDS
from models import compile as compiling
from optim.build import fused
from plan import rate_at_peak, set_numerics
from tests.kits.toy import Alone, Toy, batch
from tests.kits.trained import lively

EXACT, FAST = (False, False, "ieee", "ieee"), (True, True, "ieee", "ieee")


@pytest.fixture(autouse=True)
def put_back():
    before = float32_settings()
    yield
    (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) = before[:2]
    (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision) = before[2:]


@pytest.mark.parametrize("fast_math, tf32", [*product([False, True], repeat=2)])
def test_training_and_evaluation_each_have_their_own(fast_math, tf32):
    """`float32_settings` reads what Inductor reads, and raises when both ways were used to set it."""
    set_numerics(Options(fast_math=fast_math))
    training, seen = float32_settings(), []

    class Spy(Toy):
        def forward(self, images):
            seen.append(float32_settings())
            return super().forward(images)

    assert training == (FAST if fast_math else EXACT)
    evaluation = engine.Evaluation(lambda b: (b.images, b.targets), torch.device("cpu"), tf32=tf32, process=Alone())
    engine.evaluate([("a", Spy())], [batch(range(4), range(4))], evaluation)
    assert seen == [FAST if tf32 else EXACT] and float32_settings() == training
    with pytest.raises(ZeroDivisionError), float32_products():
        raise ZeroDivisionError
    assert float32_settings() == training


@pytest.mark.parametrize("fast_math", [False, True])
def test_what_is_compiled_computes_as_the_training_does(monkeypatch, fast_math):
    """The compiler sees the run's own settings in training, and true float32 in evaluation."""
    set_float32(fast_math)
    seen, exact = [], compiling._passes
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *given: seen.append(float32_settings()) or call(*given))
    monkeypatch.setattr(compiling, "_passes", lambda *given: seen.append("pass") or exact(*given))
    compiling.compile_blocks(lively("hornet_pico_7x7").train(), (2, 3, 32, 32), None, agree=bool, from_first=str, saved="1")
    own = FAST if fast_math else EXACT
    assert seen == ["pass", "pass", "pass", EXACT, own] and float32_settings() == own
    assert torch.get_float32_matmul_precision() == ("high" if fast_math else "highest")


def test_phases_are_timed_on_the_devices_own_clock(monkeypatch):
    """A queue's events, made up: the host's clock is not asked."""
    class Event:
        ticks = 0

        def __init__(self, device, enable_timing):
            assert enable_timing

        def record(self):
            Event.ticks += 1
            self.at = Event.ticks ** 2

        def elapsed_time(self, other):
            return 1000.0 * (other.at - self.at)

        def synchronize(self):
            Event.ticks += 100

    monkeypatch.setattr(devices, "asynchronous", lambda device: True)
    monkeypatch.setattr(torch, "Event", Event)
    clock = PhaseClock(torch.device("cuda"))
    for phase in ("data", "forward", "data", "other"):
        clock.begins(phase)
    assert clock.read() == {"data": 3 + 7, "forward": 5} == clock.read() and Event.ticks > 100


@pytest.mark.parametrize("name, dtype, tf32, peak", [
    ("NVIDIA H200", torch.bfloat16, False, 989e12), ("NVIDIA H100 PCIe", torch.float16, True, 756e12),
    ("NVIDIA A100-SXM4-80GB", None, True, 156e12), ("NVIDIA A100-SXM4-80GB", None, False, None),
    ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165e12), ("Quadro M2000", torch.bfloat16, True, None)])
def test_peaks_of_known_devices(name, dtype, tf32, peak):
    assert dense_peak(name, dtype, tf32) == peak


def test_copies_go_through_a_stream_of_their_own_where_there_is_a_queue(monkeypatch):
    """In this order: copied on the side stream, awaited by the current one, which also keeps the memory."""
    normalise = device_room.Normalise(ImageSettings(), "cpu")
    done = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            done.append(f"on {self.name}")

        def __exit__(self, *_):
            done.append("back")

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(device_room, "asynchronous", lambda device: True)
    monkeypatch.setattr(torch, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **_: done.append("copy") or tensor)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: done.append(f"kept for {stream.name}"))
    pixels = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8)
    assert torch.equal(device_room.Normalise(ImageSettings(), "cpu")(pixels), normalise(pixels))
    assert done == ["on side", "copy", "back", "main waits for side", "kept for main", "copy"]


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("xpu", "xccl"), ("cpu", "gloo"), ("mps", "gloo")])
def test_what_is_chosen_for_a_kind_of_device(device, backend):
    """By value, where no such device is: the backend, the fused optimizer, and no queue where none is."""
    assert BACKENDS[device] == backend
    assert fused("adamw", [device]) and not fused("lamb", [device]) and not fused("adamw", [device, "meta"])
    assert not devices.asynchronous(torch.device(device))


def test_the_largest_batch_is_found_by_bisection():
    for limit in (0, 1, 2, 3, 100, 160, 1000):
        tried = []
        most = largest(lambda count: tried.append(count) or count <= limit)
        assert 0.9 * limit <= most <= limit and len(tried) <= 16


def test_the_rate_at_the_peak_of_known_devices_alone(monkeypatch):
    """hornet_tiny_7x7 has 3.98 G multiply-adds per image; two operations each, three passes in training."""
    model, two = lively("hornet_tiny_7x7"), SimpleNamespace(device=torch.device("cuda"), world_size=2)
    for name, rate in (("NVIDIA H200", 2 * 989e12 / (6 * 3.98e9)), ("a GPU of tomorrow", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert rate_at_peak(model, Options(use_amp=True), two) == (rate and pytest.approx(rate, rel=0.005))
    assert rate_at_peak(model, Options(use_amp=True), Alone()) is None
