"""Whole segmentors give the published names, logits, probabilities, losses and training steps."""
import math

import numpy as np
import pytest
import torch

from config.options import Options
from dense.backbone import load_published
from dense.inference import probabilities, scaled_boxes, slide
from dense.optim import DenseSchedule, scale_by_depth
from dense.pixels import fitted, normalised, resize
from dense.segmentor import AUXILIARY_WEIGHT, IGNORED, Segmentor, resized, segmentation_loss
from dense.zoo import HEADS, SEGMENTORS, segmentor_filters
from optim.groups import param_groups
from tests.kits.dense import dense_state, filled, given, stored

STATE_DICTS = {name: value for name, value in stored("state_dicts.json.gz").items() if name.startswith("seg/")}
CONFIGS = {published.config: published for published in SEGMENTORS.values()}


def built(config: str, **changes) -> Segmentor:
    published = CONFIGS[config.removeprefix("seg/")]
    return Segmentor(published.model, 150, segmentor_filters(published.model), HEADS[published.head], **changes)


@pytest.mark.parametrize("config", STATE_DICTS)
def test_names_shapes_and_order(config):
    with torch.device("meta"):
        model = built(config)
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == STATE_DICTS[config]
    assert sum(math.prod(p.shape) for p in model.parameters()) == CONFIGS[config.removeprefix("seg/")].params


def test_a_published_file_loads_strictly(tmp_path):
    model, other = filled(Segmentor("hornet_pico_gf", width=16)), Segmentor("hornet_pico_gf", width=16)
    state = {f"module.{name}": value for name, value in model.state_dict().items()
             if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "meta": {"epoch": 1}, "optimizer": {}}, tmp_path / "published.pth")
    load_published(other, tmp_path / "published.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    for change in ({"decode_head.more": torch.ones(1)}, {"decode_head.conv_seg.bias": torch.ones(3)}):
        torch.save({"state_dict": state | change}, tmp_path / "other.pth")
        with pytest.raises(Exception) as error:
            load_published(other, tmp_path / "other.pth")
        assert error.value.code == "other_model" and next(iter(change)) in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "whole_upernet_hornet_tiny_7x7_64x96", "whole_upernet_hornet_tiny_gf_72x104",
    "whole_horfpn_7x7_upernet_hornet_small_7x7_64x64", "whole_horfpn_gf_upernet_hornet_small_7x7_64x80",
    "slide_tiny_7x7_96x160", "slide_tiny_gf_40x100"])
def test_logits(name):
    arrays, meta = stored(f"segmentors/{name}.npz")
    model, images = filled(built(meta["config"])), given(meta["input"])
    logits = slide(model, images, meta["crop_size"][0], meta["stride"][0]) if "stride" in meta else model(images)
    if meta.get("ori_shape"):
        logits = resized(logits, meta["ori_shape"])
    assert np.abs(logits[:, :, ::meta["step"], ::meta["step"]].numpy() - arrays["logits"]).max() < 1e-4
    assert logits.double().norm().item() == pytest.approx(arrays["stat"][1], rel=1e-5)
    top = logits.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 1e-3).numpy()
    assert np.array_equal(logits.argmax(1).numpy()[clear], arrays["labels"][clear]) and clear.mean() > 0.99


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "picture_single_100x70", pytest.param("picture_ms_flip_100x70", marks=pytest.mark.slow)])
def test_image_to_probabilities(name):
    arrays, meta = stored(f"segmentors/{name}.npz")
    image = given(meta["picture"].removesuffix(" (RGB)")).numpy()
    variants = []
    for box in scaled_boxes(meta["img_scale"], meta["img_ratios"] or [1.0]):
        pixels = resize(image, fitted(image.shape[:2], box))
        for flipped in (False, True)[:1 + meta["flip"]]:
            variants.append((normalised(torch.from_numpy(pixels.copy())[None]).flip(3) if flipped
                             else normalised(torch.from_numpy(pixels.copy())[None]), flipped))
    assert [list(x.shape[2:]) for x, _ in variants] == meta["scaled_sizes_hw"]
    found = probabilities(filled(built(meta["config"])), variants, image.shape[:2], meta["crop_size"][0],
                          meta["stride"][0])
    assert np.abs(found[:, :, ::meta["step"], ::meta["step"]].numpy() - arrays["prob"]).max() < 1e-5
    agree = found.argmax(1)[0].numpy() == arrays["labels"]
    assert agree.mean() > 0.999


def pixel_accuracy(logits, labels):
    """Percent of the pixels with a label that are correct."""
    valid = labels != IGNORED
    correct = (resized(logits, labels.shape[1:]).argmax(1) == labels) & valid
    return 100 * correct.sum() / valid.sum().clamp(min=1)


def losses(model, images, labels):
    decode, auxiliary = model.both(images)
    return {"decode.loss_ce": segmentation_loss(decode, labels), "decode.acc_seg": pixel_accuracy(decode, labels),
            "aux.loss_ce": AUXILIARY_WEIGHT * segmentation_loss(auxiliary, labels),
            "aux.acc_seg": pixel_accuracy(auxiliary, labels)}


@torch.no_grad()
@pytest.mark.parametrize("case", stored("segmentors/losses.json"), ids=lambda case: case["config"][4:14])
def test_losses_divide_by_ignored_pixels_too(case):
    found = losses(filled(built(case["config"])), given(case["input"]), given(case["labels"]))
    for name, value in case["losses"].items():
        assert found[name].item() == pytest.approx(value, rel=1e-4), name
    assert sum(found[name] for name in found if "loss" in name).item() == pytest.approx(case["total"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", stored("segmentors/trajectories.json.gz"), ids=lambda case: case["config"][4:14])
def test_trajectories(case):
    model = built(case["config"])
    model.load_state_dict(dense_state(model))
    model.train()
    model.decode_head.dropout = model.auxiliary_head.dropout = 0.0
    rule = case["paramwise"]
    groups = param_groups(model.named_parameters(), case["weight_decay"],
                          scale_of=scale_by_depth(rule["decay_rate"], rule["num_layers"], rule["decay_type"][:5]))
    optimizer = torch.optim.AdamW(groups, lr=case["lr"])
    schedule = DenseSchedule(Options(lr=case["lr"], min_lr=0.0, weight_decay=case["weight_decay"], epochs=1,
                                     warmup_steps=case["warmup_iters"]), case["max_iters"])
    for i, expected in enumerate(case["log"]):
        schedule.apply(optimizer, i)
        images = given(case["inputs"].replace("1000+i", str(1000 + i)))
        found = losses(model, images, given(case["labels"].replace("2000+i", str(2000 + i))))
        sum(found[name] for name in found if "loss" in name).backward()
        limit = case["grad_clip"] or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in found.items():
            if "loss" in name:
                assert value.item() == pytest.approx(expected[name], abs=1e-4), (i, name)
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=3e-3)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx(
            sorted(set(expected["lrs"])), rel=1e-12)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        total, norm = case["state"][name]
        assert value.double().norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
        if value.numel() < 10_000:
            assert value.double().sum().item() == pytest.approx(total, abs=3e-2), name
