"""Parameter groups and schedules of every published configuration."""
import pytest

from config.options import Options
from config.parse import RECIPES, parse
from dense.optim import DenseSchedule, scale_by_depth
from dense.options import SegmentationOptions
from dense.zoo import SEGMENTORS
from optim.groups import param_groups
from tests.kits.dense import stored

GROUPS = stored("param_groups.json.gz")


def rule(config: str):
    if config.startswith("seg/"):
        return scale_by_depth(0.8 if "large" in config else 0.9, 6 if "tiny" in config else 12, "stage")
    if "cascade" not in config:
        return scale_by_depth(0.95, 6, "layer")
    return scale_by_depth(0.8 if "base" in config else 0.7, 12, "layer")


class Parameter:
    requires_grad = True

    def __init__(self, shape):
        self.ndim = len(shape)


@pytest.mark.parametrize("config", GROUPS)
def test_parameter_groups(config):
    expected = GROUPS[GROUPS[config].get("same_as", config)]["groups"]
    named = [(name, Parameter(shape)) for name, shape in stored("state_dicts.json.gz")[config]
             if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    found = {name: [group["lr_scale"], group["weight_decay"]]
             for group in param_groups(named, 0.05, scale_of=rule(config)) for name in group["names"]}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12), name


@pytest.mark.parametrize("stored_schedule", stored("schedules.json"), ids=lambda each: each["kind"])
def test_schedules(stored_schedule):
    kind, warmup = stored_schedule["kind"], stored_schedule["warmup_iters"]
    poly = kind == "poly"
    schedule = DenseSchedule(
        Options(lr=stored_schedule["lr"], min_lr=0.0, warmup_steps=warmup,
                epochs=10 if poly else stored_schedule["epochs"]), shape=kind,
        updates_per_epoch=stored_schedule["max_iters"] // 10 if poly else stored_schedule["updates_per_epoch"],
        milestones=tuple(stored_schedule.get("milestones", ())))
    for update, value in stored_schedule["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", SEGMENTORS)
def test_recipes_of_segmentors(name):
    published = SEGMENTORS[name]
    options = parse(["--config", str(RECIPES / f"ade20k_{name}.yaml"), "--data_path", "x"], SegmentationOptions).options
    assert options.published is published and options.stride == {512: 341, 640: 426}[published.crop]
    config = f"seg/{published.config}"
    expected = GROUPS[GROUPS[config].get("same_as", config)]["groups"]
    assert rule(config)("backbone.stages.3.0.gamma1") == pytest.approx(
        scale_by_depth(options.decay_rate, options.decay_layers, "stage")("backbone.stages.3.0.gamma1"))
    assert expected["backbone.stages.3.0.gamma1"][0] == pytest.approx(options.decay_rate ** (options.decay_layers - 3))
    assert (options.updates, options.check_every, options.warmup_steps, options.epochs) == (160_000, 16_000, 1500, 10)
    gf = "gf" in name
    assert options.clip_grad == (None if not gf else 0.1 if "large" in name or "horfpn" in name else 1)
