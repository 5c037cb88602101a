"""The optimizer by name, its groups against the published ones, and which states it takes over."""
import json

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401  (registers the networks)
from config.options import Options
from optim.build import build_optimizer
from optim.groups import count_layers, layer_id, param_groups
from tests.kits.errors import refused
from tests.kits.fill import PARITY

PUBLISHED = json.loads((PARITY / "param_groups.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_groups_in_published_order(case):
    name, decay = case.split("|layer_decay=")
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups(model.named_parameters(), 0.05, float(decay))
    ours = {name: [g["weight_decay"], g["lr_scale"]] for g in groups for name in g["names"]}
    assert ours == PUBLISHED[case]
    assert list(ours) == list(PUBLISHED[case])  # the order in which optimizer states are numbered
    model.freeze("stages.1-2")  # which changes nothing for the others
    kept = {name: group["lr_scale"] for group in param_groups(model.named_parameters(), 0.05, float(decay))
            for name in group["names"]}
    assert kept == {name: ours[name][1] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("depth, last", [(1, 4), (2, 4), (3, 5), (9, 8), (18, 12), (27, 12)])
def test_layers_of_other_depths(depth, last):
    names = [f"stages.2.{block}.norm1.weight" for block in range(depth)]
    ids = [layer_id(name, last) for name in names]
    assert count_layers(names) == last and ids == sorted(ids) and (ids[0], ids[-1]) == (3, last - 1)
    assert [layer_id(name, last) for name in ("downsample_layers.3.1.weight", "stages.3.0.gamma1", "head.weight")] == [
        last, last, last + 1]


def trained(model=None, **changes):
    """An optimizer by our options after one step of a Linear(3, 3)."""
    model = model or nn.Linear(3, 3)
    optimizer = build_optimizer(model, Options(**{**dict(lr=1e-3, opt_eps=1e-6, momentum=0.8), **changes}))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum", "lamb", "lion", "nadam", "lookahead_adamw"])
def test_optimizers_by_name(opt):
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    group = trained(model, opt=opt, opt_betas=[0.8, 0.9]).param_groups[0]
    assert not torch.equal(before, model.weight) and group.get("eps", 1e-6) == 1e-6
    assert group.get("betas", (0.8, 0.9)) == (0.8, 0.9) and group.get("momentum", 0.8) == 0.8


@pytest.mark.parametrize("opt", ["adamww", "adahessian", "nonsense"])
def test_unknown_optimizer_is_one_sentence(opt):
    with refused("invalid_value", f"--opt {opt}", "adam"):
        trained(opt=opt)


def test_the_state_of_an_unfused_run_keeps_our_kernel():
    optimizer, state = trained(), trained().state_dict()
    state["param_groups"][0] |= {"fused": None, "lr": 7.0}
    state["state"][0]["exp_avg"].fill_(3.0)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr"] == 1e-3
    assert (optimizer.state_dict()["state"][0]["exp_avg"] == 3).all()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("moment", [None, torch.zeros(1, 1, 1), torch.zeros(3, 4), torch.zeros(3, 3).to_sparse(), 1.0])
def test_a_damaged_state_or_one_of_another_model_is_refused(moment):
    optimizer = trained()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = moment
    with refused("invalid_checkpoint", "exp_avg of tensor 0", "--model"):
        optimizer.load_state_dict(state)
    with refused("invalid_checkpoint", "groups of [2, 2] tensors", "--layer_decay"):
        optimizer.load_state_dict(trained(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).state_dict())
