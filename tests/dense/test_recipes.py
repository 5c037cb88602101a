"""The recipes are the published ones: parameter groups, learning rates, schedules, lengths."""
from types import SimpleNamespace

import pytest

from config.options import Options
from config.parse import RECIPES, parse
from dense.evaluation import DETECTOR, SEGMENTOR
from dense.optim import DenseSchedule, scale_by_depth
from optim.groups import param_groups
from tests.kits.dense import stored

GROUPS = stored("param_groups.json.gz")
NAMES = stored("state_dicts.json.gz")
DROP_PATH = {"seg": {"tiny": 0.4, "small": 0.3, "base_7x7": 0.4, "base_gf": 0.5, "large": 0.4},
             "det": {"tiny": 0.4, "small": 0.6, "base": 0.7, "large": 0.7}}
CLIP = {"upernet_tiny_gf": 1, "upernet_small_gf": 1, "upernet_base_gf": 1, "upernet_large_gf": 0.1,
        "horfpn_small_gf": 0.1}


@pytest.mark.parametrize("config", GROUPS)
def test_recipe(config):
    kind, file, by = (SEGMENTOR, "ade20k", "stage") if config[:3] == "seg" else (DETECTOR, "coco", "layer")
    name, row = next((name, row) for name, row in kind.published.items() if row.config == config[4:])
    options = parse(["--config", str(RECIPES / f"{file}_{name}.yaml")], kind.options).options
    assert options.published is row and options.lr == GROUPS[config]["base_lr"]
    expected = GROUPS[GROUPS[config].get("same_as", config)]["groups"]
    named = [(each, SimpleNamespace(requires_grad=True, ndim=len(shape))) for each, shape in NAMES[config]
             if not each.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    scale = scale_by_depth(options.decay_rate, options.decay_layers, by)
    groups = param_groups(named, options.weight_decay, scale_of=scale)
    found = {each: [group["lr_scale"], group["weight_decay"]] for group in groups for each in group["names"]}
    assert found.keys() == expected.keys()
    assert all(found[each] == pytest.approx(values, rel=1e-12) for each, values in expected.items())
    rates = DROP_PATH[config[:3]].items()
    assert options.drop_path == next(rate for size, rate in rates if size in row.model)
    assert (options.clip_grad, options.model_ema) == (CLIP.get(name), False)
    assert (options.batch_size, options.global_batch) == (2, 16)
    if kind is SEGMENTOR:
        assert (options.updates, options.check_every, options.warmup_steps) == (160_000, 16_000, 1500)
        assert options.stride == {512: 341, 640: 426}[row.crop]
        assert options.image_scale == (4 * row.crop, row.crop)
    else:
        cascade = row.system == "cascade_mask_rcnn"
        assert (options.epochs, options.milestones) == ((36, (27, 33)) if cascade else (12, (8, 11)))
        assert options.warmup_steps == 500


@pytest.mark.parametrize("case", stored("schedules.json"), ids=lambda case: f"{case['kind']}-{case['lr']}")
def test_schedules(case):
    poly = case["kind"] == "poly"
    schedule = DenseSchedule(
        Options(lr=case["lr"], min_lr=0.0, warmup_steps=case["warmup_iters"],
                epochs=10 if poly else case["epochs"]),
        case["max_iters"] // 10 if poly else case["updates_per_epoch"], shape=case["kind"],
        milestones=tuple(case.get("milestones", ())))
    for update, value in case["values"].items():
        assert schedule.lr(int(update)) == pytest.approx(value, rel=1e-12)
