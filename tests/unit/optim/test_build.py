"""Which tensors decay and how layers scale the learning rate, against the published groups."""
import json
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401  (registers the networks)
from common.errors import UserError
from config.options import Options
from optim.build import build_optimizer
from optim.groups import count_layers, layer_id, param_groups
from optim.schedule import Schedule

PUBLISHED = json.loads((Path(__file__).parents[2] / "data/parity/param_groups.json").read_text())


def network(name):
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_groups_in_published_order(case):
    name, decay = case.split("|layer_decay=")
    groups = param_groups(network(name).named_parameters(), 0.05, float(decay))
    ours = {name: [g["weight_decay"], g["lr_scale"]] for g in groups for name in g["names"]}
    assert ours == PUBLISHED[case]
    assert list(ours) == list(PUBLISHED[case])  # the order in which optimizer states are numbered
    model = network(name)
    model.freeze("stages.1-2")  # which changes nothing for the others
    kept = {name: group["lr_scale"] for group in param_groups(model.named_parameters(), 0.05, float(decay))
            for name in group["names"]}
    assert kept == {name: ours[name][1] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("depth,last", [(1, 4), (2, 4), (3, 5), (9, 8), (18, 12), (27, 12)])
def test_layers_of_other_depths(depth, last):
    names = [f"stages.2.{block}.norm1.weight" for block in range(depth)]
    assert count_layers(names) == last
    ids = [layer_id(name, last) for name in names]
    assert ids == sorted(ids) and ids[0] == 3 and ids[-1] == last - 1
    assert layer_id("stages.3.0.gamma1", last) == last and layer_id("head.weight", last) == last + 1
    assert layer_id("downsample_layers.3.1.weight", last) == last


def settings(**changes):
    return Options(**{**dict(lr=1e-3, opt_eps=1e-6, momentum=0.8), **changes})


def test_scales_reach_the_optimizer_and_end_at_zero_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    optimizer = build_optimizer(model, settings())
    schedule = Schedule(Options(lr=1e-3, min_lr=0.0, weight_decay_end=0.0, epochs=1, warmup_epochs=0), 4)
    for update in (0, 3, 9, 1):
        schedule.apply(optimizer, update)
        decaying, plain = optimizer.param_groups
        assert decaying["weight_decay"] == schedule.weight_decay(update) and plain["weight_decay"] == 0
        assert decaying["lr"] == schedule.lr(update)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum", "lamb", "lion", "nadam", "lookahead_adamw"])
def test_optimizers_by_name(opt):
    model = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(model, settings(opt=opt, opt_betas=[0.8, 0.9]))
    before = model.weight.detach().clone()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
    group = optimizer.param_groups[0]
    assert group.get("betas", (0.8, 0.9)) == (0.8, 0.9) and group.get("momentum", 0.8) == 0.8
    assert group.get("eps", 1e-6) == 1e-6


@pytest.mark.parametrize("opt", ["adamww", "adahessian", "nonsense"])
def test_unknown_optimizer_is_one_sentence(opt):
    with pytest.raises(UserError, match=f"--opt {opt} .*adam|--opt {opt} .*accepted"):
        build_optimizer(torch.nn.Linear(2, 2), settings(opt=opt))


def test_optimizer_state_of_an_unfused_run_keeps_our_kernel():
    model = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(model, settings())
    groups = param_groups(model.named_parameters(), 0.05)
    plain = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    theirs = torch.optim.AdamW(plain, lr=7.0)
    model(torch.ones(2, 3)).sum().backward()
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr"] == 1e-3
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], theirs.state[model.weight]["exp_avg"])
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 2


def test_optimizer_state_of_another_model_is_refused():
    wide = build_optimizer(torch.nn.Linear(3, 4), settings())
    for model in (torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))):
        optimizer = build_optimizer(model, settings())
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        with pytest.raises(UserError, match="checkpoint's optimizer state"):
            wide.load_state_dict(optimizer.state_dict())
