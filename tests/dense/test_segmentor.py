"""Names, maps, logits, losses and training steps are the published ones (computed by the authors' modules)."""
import math

import numpy as np
import pytest
import torch

from config.options import Options
from dense.backbone import Backbone, load_backbone, load_published
from dense.evaluation import DETECTOR, SEGMENTOR, load_trained
from dense.inference import probabilities, scaled_boxes, slide
from dense.optim import DenseSchedule, scale_by_depth
from dense.pixels import fitted, normalised, resize
from dense.segmentor import AUXILIARY_WEIGHT, IGNORED, Segmentor, resized, segmentation_loss
from models.hornet import CONFIGS, HorNet
from optim.groups import param_groups
from tests.kits.dense import filled, given, published, same_sums, stored
from tests.kits.errors import refused
from tests.kits.fill import parity_tensor

NAMES = stored("state_dicts.json.gz")
LARGE = ((24, 13), (12, 7))


@pytest.mark.filterwarnings("ignore:for .*no-op")
@pytest.mark.parametrize("config", NAMES)
def test_published_files_load_strictly(config, tmp_path):
    """Generated files with exactly the published names and shapes; all tensors are views of one."""
    kind = SEGMENTOR if config.startswith("seg/") else DETECTOR
    row = next(row for row in kind.published.values() if row.config == config[4:])
    model = published(config)
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == NAMES[config]
    assert sum(math.prod(p.shape) for p in model.parameters()) == row.params
    values = torch.full((max(math.prod(shape) for _, shape in NAMES[config]),), 0.5, dtype=torch.half)
    state = {f"module.{name}": values[:math.prod(shape)].view(shape) for name, shape in NAMES[config]}
    torch.save({"state_dict": state, "meta": {"epoch": 1}, "optimizer": {}}, tmp_path / "file.pth")
    with torch.device("meta"):
        found = load_trained(kind, tmp_path / "file.pth", device="meta")
    assert found.options.published is row and found.entry == "state_dict"


def test_a_file_of_something_else_is_refused(tmp_path):
    model, other = filled(Segmentor("hornet_pico_gf", width=16)), Segmentor("hornet_pico_gf", width=16)
    state = model.state_dict()
    older = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": older}, tmp_path / "file.pth")
    load_published(other, tmp_path / "file.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    for code, change in (("other_model", {"decode_head.more": torch.ones(1)}),
                         ("other_model", {"decode_head.conv_seg.bias": torch.ones(3)}),
                         ("nonfinite_weights", {"decode_head.conv_seg.bias": torch.full((150,), math.nan)})):
        torch.save({"state_dict": state | change}, tmp_path / "other.pth")
        with refused(code, *change):
            load_published(other, tmp_path / "other.pth")


def test_a_backbone_starts_from_a_classification_file(tmp_path):
    arrays, meta = stored("backbone/pretrained_filters.npz")
    with torch.device("meta"):
        empty = HorNet(CONFIGS["hornet_tiny_gf"]).state_dict()
    state = {f"module.{name}": torch.from_numpy(parity_tensor(name, tuple(value.shape)))
             for name, value in empty.items()}
    torch.save({"model": state}, tmp_path / "tiny.pth")
    backbone = Backbone("hornet_tiny_gf", LARGE)
    load_backbone(backbone, tmp_path / "tiny.pth")
    found = backbone.state_dict()
    for array, name in zip((arrays["stage2"], arrays["stage3"]), meta["names"]):
        assert np.abs(found[name][::8].numpy() - array).max() < 5e-5
    assert torch.equal(found["stages.1.0.norm1.weight"], state["module.stages.1.0.norm1.weight"])
    assert (found["norm3.weight"] == 1).all() and (found["norm0.bias"] == 0).all()
    with refused("other_model", "tiny.pth"):
        load_backbone(Backbone("hornet_tiny_7x7"), tmp_path / "tiny.pth")


@torch.no_grad()
@pytest.mark.parametrize("file, part, tolerance", [
    ("backbone/tiny_7x7_seg_64x96", "backbone", 5e-5), ("backbone/tiny_gf_seg_72x104", "backbone", 5e-5),
    ("backbone/tiny_gf_det_96x160", "backbone", 5e-5), ("backbone/tiny_gf_det_256x320", "backbone", 5e-5),
    ("backbone/tiny_gf_eps_64x96", "backbone", 5e-5), ("heads/fpn_16x24", "neck", 1e-4),
    ("heads/gnfpn_7x7_16x24", "neck", 5e-4), ("heads/gnfpn_gf_15x21", "neck", 5e-5),
    ("heads/gnfpn_gf_48x40", "neck", 5e-5)])
def test_maps(file, part, tolerance):
    arrays, meta = stored(f"{file}.npz")
    module = filled(published(meta["config"]).get_submodule(part), f"{part}.", meta.get("factors"))
    found = module([given(call) for call in meta["inputs"]] if part == "neck" else given(meta["input"]))
    same_sums(found, arrays["stat"], tolerance)
    for x, name in zip(found, sorted(arrays.keys() - {"stat"}), strict=True):
        step = x.shape[1] // arrays[name].shape[1]
        assert np.abs(x[:, ::step].numpy() - arrays[name]).max() < tolerance, name


@torch.no_grad()
@pytest.mark.parametrize("name", ["uper_tiny_16x24", "gnuper_7x7_small_18x26", "gnuper_gf_small_16x24"])
def test_heads(name):
    arrays, meta = stored(f"heads/{name}.npz")
    model, maps = published(meta["config"]), [given(call) for call in meta["inputs"]]
    head = filled(model.decode_head, "decode_head.")
    found = {"decode": head(maps)[:, ::meta["class_step"]], "psp": head.pyramid(maps[3])[:, ::8],
             "aux": filled(model.auxiliary_head, "auxiliary_head.")(maps[2])}
    assert found.keys() == arrays.keys()
    for key, value in found.items():
        assert np.abs(value.numpy() - arrays[key]).max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "whole_upernet_hornet_tiny_7x7_64x96", "whole_upernet_hornet_tiny_gf_72x104",
    "whole_horfpn_7x7_upernet_hornet_small_7x7_64x64", "whole_horfpn_gf_upernet_hornet_small_7x7_64x80",
    "slide_tiny_7x7_96x160", "slide_tiny_gf_40x100"])
def test_logits(name):
    arrays, meta = stored(f"segmentors/{name}.npz")
    model, images = filled(published(meta["config"])), given(meta["input"])
    logits = slide(model, images, 64, 42) if "stride" in meta else model(images)
    if meta.get("ori_shape"):
        logits = resized(logits, meta["ori_shape"])
    assert np.abs(logits[:, :, ::meta["step"], ::meta["step"]].numpy() - arrays["logits"]).max() < 1e-4
    same_sums([logits], [arrays["stat"]], 1e-5)
    top = logits.topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    clear = (margin > 1e-3).numpy()
    assert np.array_equal(logits.argmax(1).numpy()[clear], arrays["labels"][clear]) and clear.mean() > 0.99
    assert margin.min().item() == pytest.approx(arrays["margin"], abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "picture_single_100x70", pytest.param("picture_ms_flip_100x70", marks=pytest.mark.slow)])
def test_image_to_probabilities(name):
    arrays, meta = stored(f"segmentors/{name}.npz")
    image = given(meta["picture"].removesuffix(" (RGB)")).numpy()
    variants = []
    for box in scaled_boxes(meta["img_scale"], meta["img_ratios"] or [1.0]):
        x = normalised(torch.from_numpy(resize(image, fitted(image.shape[:2], box)).copy())[None])
        variants += [(x, False), (x.flip(3), True)][:1 + meta["flip"]]
    assert [list(x.shape[2:]) for x, _ in variants] == meta["scaled_sizes_hw"]
    found = probabilities(filled(published(meta["config"])), variants, image.shape[:2], 64, 42)
    assert np.abs(found[:, :, ::meta["step"], ::meta["step"]].numpy() - arrays["prob"]).max() < 1e-5
    assert (found.argmax(1)[0].numpy() == arrays["labels"]).mean() > 0.999
    top = found.topk(2, dim=1).values
    assert (top[:, 0] - top[:, 1]).min().item() == pytest.approx(arrays["margin"], abs=1e-5)


def losses(model, images, labels):
    """Those of both heads, and the percentage of the pixels with a label that are correct."""
    found, valid = {}, labels != IGNORED
    for name, weight, logits in zip(("decode", "aux"), (1, AUXILIARY_WEIGHT), model.both(images)):
        found[f"{name}.loss_ce"] = weight * segmentation_loss(logits, labels)
        correct = (resized(logits, labels.shape[1:]).argmax(1) == labels) & valid
        found[f"{name}.acc_seg"] = 100 * correct.sum() / valid.sum()
    return found, found["decode.loss_ce"] + found["aux.loss_ce"]


@torch.no_grad()
@pytest.mark.parametrize("case", stored("segmentors/losses.json"), ids=["upernet", "horfpn"])
def test_losses_divide_by_ignored_pixels_too(case):
    labels = given(case["labels"])
    found, total = losses(filled(published(case["config"])), given(case["input"]), labels)
    ignored, pixels = int((labels == IGNORED).sum()), labels.numel()
    assert (ignored, pixels) == (case["ignored"], case["pixels"])
    assert {name: value.item() for name, value in found.items()} == pytest.approx(case["losses"], rel=1e-4)
    assert total.item() == pytest.approx(case["total"], rel=1e-4)
    valid_mean = found["decode.loss_ce"].item() * pixels / (pixels - ignored)
    assert valid_mean == pytest.approx(case["decode_mean_over_valid"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", stored("segmentors/trajectories.json.gz"), ids=["upernet", "horfpn"])
def test_trajectories(case):
    model = filled(published(case["config"], drop_path=0.0)).train()
    model.decode_head.dropout = model.auxiliary_head.dropout = 0.0
    rule = case["paramwise"]
    groups = param_groups(model.named_parameters(), case["weight_decay"],
                          scale_of=scale_by_depth(rule["decay_rate"], rule["num_layers"], by="stage"))
    optimizer = torch.optim.AdamW(groups, lr=case["lr"])
    schedule = DenseSchedule(Options(lr=case["lr"], min_lr=0.0, weight_decay=case["weight_decay"], epochs=1,
                                     warmup_steps=case["warmup_iters"]), case["max_iters"])
    assert len(case["log"]) == case["steps"]
    for i, expected in enumerate(case["log"]):
        schedule.apply(optimizer, i)
        found, total = losses(model, given(case["inputs"].replace("1000+i", str(1000 + i))),
                              given(case["labels"].replace("2000+i", str(2000 + i))))
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case["grad_clip"] or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in found.items():  # an accuracy within ten pixels of 14,000
            assert value.item() == pytest.approx(expected[name], abs=1e-4 if "loss" in name else 0.07)
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=3e-3)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx(
            sorted(set(expected["lrs"])), rel=1e-12)
    state = {name: value.double() for name, value in model.state_dict().items() if "num_batches" not in name}
    assert state.keys() == case["state"].keys()
    for name, value in state.items():
        total, norm = case["state"][name]
        assert value.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
        assert value.numel() >= 10_000 or value.sum().item() == pytest.approx(total, abs=3e-2), name
