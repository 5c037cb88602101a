"""float32's precision, for each way a run can ask for it; clocks, copies and choices of devices that are not here."""
from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch

import engine
from common import devices
from common.devices import PhaseClock, float32_products, float32_settings, set_float32
from config.options import ImageSettings, Options
from datasets import device as device_room
from dryrun import largest
from models import compile as compiling
from optim.build import fused
from plan import rate_at_peak, set_numerics
from tests.kits.toy import Alone, Toy, batch
from tests.kits.trained import lively

EXACT, FAST = (False, False, "ieee", "ieee"), (True, True, "ieee", "ieee")


@pytest.fixture(autouse=True)
def put_back():
    with float32_products():
        yield


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
    with pytest.raises(ZeroDivisionError), float32_products(not fast_math):
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
    """Events of a queue that are made up, 1, 4, 9 and 16 s after its start: the host's clock is not asked."""
    times = iter((1, 4, 9, 16))

    def event(device, enable_timing):
        made = MagicMock(at=next(times))
        made.elapsed_time = lambda other: 1000 * (other.at - made.at)
        return made

    monkeypatch.setattr(devices, "asynchronous", lambda device: True)
    monkeypatch.setattr(torch, "Event", event)
    clock = PhaseClock(torch.device("cuda"))
    for phase in ("data", "forward", "data", "other"):
        clock.begins(phase)
    assert clock.read() == {"data": 3 + 7, "forward": 5} == clock.read()
    clock.marks[-1][1].synchronize.assert_called()


def test_copies_go_through_a_stream_of_their_own_where_there_is_a_queue(monkeypatch):
    """In this order: copied on the side stream, awaited by the current one, which also keeps the memory."""
    pixels, done = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8), MagicMock()
    plain = device_room.Normalise(ImageSettings(), "cpu")(pixels)
    monkeypatch.setattr(device_room, "asynchronous", lambda device: True)
    monkeypatch.setattr(torch, "Stream", lambda device: done.side)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: done.main)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **_: done.copy() and tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: done.kept_for(stream))
    assert torch.equal(device_room.Normalise(ImageSettings(), "cpu")(pixels), plain)
    assert done.mock_calls == [call.side.__bool__(), call.side.__enter__(), call.copy(), call.copy().__bool__(),
                               call.side.__exit__(None, None, None), call.main.wait_stream(done.side),
                               call.kept_for(done.main)]


def test_one_kernel_makes_a_step_of_adamw_alone_where_all_devices_have_it():
    assert fused("adamw", ["cuda"]) and not fused("lamb", ["cuda"]) and not fused("adamw", ["cuda", "meta"])


def test_the_largest_batch_is_found_by_bisection():
    for limit in (0, 1, 2, 3, 100, 160, 1000):
        tried = []
        most = largest(lambda count: tried.append(count) or count <= limit)
        assert 0.9 * limit <= most <= limit and len(tried) <= 16


@pytest.mark.parametrize("name, amp, peak", [
    ("NVIDIA H200", True, 989e12), ("NVIDIA H100 PCIe", True, 756e12), ("NVIDIA A100-SXM4-80GB", False, 156e12),
    ("a GPU of tomorrow", True, None)])
def test_the_rate_at_the_peak_of_known_devices_alone(monkeypatch, name, amp, peak):
    """hornet_tiny_7x7 has 3.98 G multiply-adds per image; two operations each, three passes in training."""
    model, two = lively("hornet_tiny_7x7"), SimpleNamespace(device=torch.device("cuda"), world_size=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    rate = peak and pytest.approx(2 * peak / (6 * 3.98e9), rel=0.005)
    assert rate_at_peak(model, Options(use_amp=amp, fast_math=True), two) == rate
    assert rate_at_peak(model, Options(use_amp=True), Alone()) is None
