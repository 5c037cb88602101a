"""float32's precision: the settings themselves, for each way a run can ask for them."""
from itertools import product

import pytest
import torch

import engine
from common.devices import float32_products, float32_settings, set_float32
from config.options import Options
from models import compile as compiling
from plan import set_numerics
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
    seen, exact = [], compiling._logits_and_gradients
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *given: seen.append(float32_settings()) or call(*given))
    monkeypatch.setattr(compiling, "_logits_and_gradients", lambda *given: seen.append("pass") or exact(*given))
    compiling.compile_blocks(lively("hornet_pico_7x7").train(), (2, 3, 32, 32), None, agree=bool, from_first=str, saved="1")
    own = FAST if fast_math else EXACT
    assert seen == ["pass", "pass", "pass", own, EXACT] and float32_settings() == own  # the last is of an evaluation
    assert torch.get_float32_matmul_precision() == ("high" if fast_math else "highest")
