"""What follows a non-finite update, and the place where a non-finite number came from."""
import copy

import torch

from optim.finite import FiniteWatch, diagnose
from tests.kits.toy import Toy


def test_when_it_gives_up():
    watch = FiniteWatch("skip", in_a_row=3, give_up_after=2)
    answers = [watch.decide(False) for _ in range(9)]
    assert answers == ["skip", "skip", "rollback", "skip", "skip", "rollback", "skip", "skip", "stop"]
    watch = FiniteWatch("skip", in_a_row=3, give_up_after=2)
    answers = [watch.decide(number % 2 == 0) for number in range(50)]
    assert answers[:41].count("skip") == 20 and "stop" not in answers[:41] and answers[41] == "stop"
    # How a loss scale finds its value is not held against the run.
    assert [FiniteWatch("stop").decide(False, overflow=True) for _ in range(20)] == ["go"] * 20


def test_diagnosis_changes_nothing_and_finds_gradients_and_weights():
    model, images = Toy(), torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    clean = diagnose(model, lambda: model(images).sum())
    assert not clean["reproduced"] and clean["first_module"] == "" and clean["parameters"] == []
    assert all(p.grad is None for p in model.parameters())
    bad = diagnose(model, lambda: (model(images) * 0).abs().sqrt().sum())
    assert bad["reproduced"] and bad["parameters"][0].startswith("head.")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.branch.weight[0, 0] = float("nan")
    broken = diagnose(model, lambda: model(images).sum())
    assert broken["first_module"] == "branch" and broken["parameters"] == ["branch.weight"]
    assert not any(module._forward_hooks for module in model.modules())
