"""Names, maps, logits, losses and training steps are the published ones, computed by the authors' modules."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, roi_align

from config.options import Options
from dense import boxes as geometry
from dense.backbone import Backbone, load_backbone, load_published
from dense.detector_losses import STAGE_STDS, Truth, refined, roi_losses, rois_of, rpn_losses
from dense.evaluation import load_trained
from dense.inference import probabilities, scaled_boxes, slide
from dense.optim import DenseSchedule, scale_by_depth
from dense.pixels import fitted, normalised, resize
from dense.segmentor import AUXILIARY_WEIGHT, IGNORED, Segmentor, resized, segmentation_loss
from optim.groups import param_groups
from tests.kits import trained
from tests.kits.dense import dense_boxes, dense_masks, files, filled, given, published, row_of, stored
from tests.kits.errors import refused
from tests.kits.fill import parity_input

NAMES = stored("state_dicts.json.gz")
LARGE = ((24, 13), (12, 7))


@pytest.mark.filterwarnings("ignore:for .*no-op")
@pytest.mark.parametrize("config", NAMES)
def test_published_files_load_strictly(config, tmp_path):
    """Generated files with exactly the published names and shapes; all tensors are views of one."""
    (kind, _, row), model = row_of(config), published(config)
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == NAMES[config]
    assert sum(math.prod(p.shape) for p in model.parameters()) == row.params
    values = torch.full((max(math.prod(shape) for _, shape in NAMES[config]),), 0.5, dtype=torch.half)
    state = {f"module.{name}": values[:math.prod(shape)].view(shape) for name, shape in NAMES[config]}
    torch.save({"state_dict": state, "meta": {"epoch": 1}, "optimizer": {}}, tmp_path / "file.pth")
    with torch.device("meta"):
        found = load_trained(kind, tmp_path / "file.pth", device="meta")
    assert found.options.published is row and found.entry == "state_dict"


def test_a_file_of_something_else_is_refused(tmp_path):
    model = Segmentor("hornet_pico_gf", width=16)
    state = {name: value.clone() for name, value in model.state_dict().items() if "num_batches" not in name}
    for code, change in (("other_model", {"decode_head.more": torch.ones(1)}),
                         ("other_model", {"decode_head.conv_seg.bias": torch.ones(3)}),
                         ("nonfinite_weights", {"decode_head.conv_seg.bias": torch.full((150,), math.nan)})):
        torch.save({"state_dict": state | change}, tmp_path / "other.pth")
        with refused(code, *change):
            load_published(model, tmp_path / "other.pth")
    torch.save({"state_dict": state}, tmp_path / "older.pth")
    load_published(Segmentor("hornet_pico_gf", width=16), tmp_path / "older.pth")


def test_a_backbone_starts_from_a_classification_file(tmp_path):
    arrays, meta = stored("backbone/pretrained_filters.npz")
    state = trained.filled("hornet_tiny_gf").state_dict()
    torch.save({"model": state}, tmp_path / "tiny.pth")
    backbone = Backbone("hornet_tiny_gf", LARGE)
    load_backbone(backbone, tmp_path / "tiny.pth")
    found = backbone.state_dict()
    for array, name in zip((arrays["stage2"], arrays["stage3"]), meta["names"]):
        assert np.abs(found[name][::8].numpy() - array).max() < 5e-5
    assert torch.equal(found["stages.1.0.norm1.weight"], state["stages.1.0.norm1.weight"])
    assert (found["norm3.weight"] == 1).all() and (found["norm0.bias"] == 0).all()
    with refused("other_model", "tiny.pth"):
        load_backbone(Backbone("hornet_tiny_7x7"), tmp_path / "tiny.pth")


def same_sums(maps, stat, tolerance: float) -> None:
    """The sum and the 2-norm of each whole map are the stored ones."""
    for x, (total, norm) in zip(maps, stat, strict=True):
        assert x.double().sum().item() == pytest.approx(total, abs=tolerance * x.numel())
        assert x.double().norm().item() == pytest.approx(norm, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("file", files("backbone/tiny*") + files("heads/*fpn*"))
def test_maps(file):
    (arrays, meta), part = stored(file), "neck" if "fpn" in file else "backbone"
    tolerance = {"heads/fpn_16x24.npz": 1e-4, "heads/gnfpn_7x7_16x24.npz": 5e-4}.get(file, 5e-5)
    module = filled(published(meta["config"]).get_submodule(part), f"{part}.", meta.get("factors"))
    found = module([given(call) for call in meta["inputs"]] if part == "neck" else given(meta["input"]))
    same_sums(found, arrays["stat"], tolerance)
    for x, name in zip(found, sorted(arrays.keys() - {"stat"}), strict=True):
        step = x.shape[1] // arrays[name].shape[1]
        assert np.abs(x[:, ::step].numpy() - arrays[name]).max() < tolerance, name


@torch.no_grad()
@pytest.mark.parametrize("file", files("heads/*uper*"))
def test_heads(file):
    arrays, meta = stored(file)
    model, maps = published(meta["config"]), [given(call) for call in meta["inputs"]]
    head = filled(model.decode_head, "decode_head.")
    found = {"decode": head(maps)[:, ::meta["class_step"]], "psp": head.pyramid(maps[3])[:, ::8],
             "aux": filled(model.auxiliary_head, "auxiliary_head.")(maps[2])}
    assert found.keys() == arrays.keys()
    for key, value in found.items():
        assert np.abs(value.numpy() - arrays[key]).max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("file", files("segmentors/[sw]*"))
def test_logits(file):
    arrays, meta = stored(file)
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


# Detection

CPU = torch.device("cpu")


def near(boxes: np.ndarray, noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes moved by `noise`, clipped to an image, x1 <= x2 and y1 <= y2."""
    values = (boxes + noise.numpy()).clip(0, [width, height, width, height]).reshape(-1, 2, 2)
    return torch.from_numpy(np.sort(values, axis=1).reshape(-1, 4).astype(np.float32))


def labels(seed: int, end: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, end, count))


def unpacked(packed: np.ndarray, *shape: int) -> np.ndarray:
    return np.unpackbits(packed)[:np.prod(shape)].reshape(shape)


def close(found, expected, relative: float = 1e-5, absolute: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=relative, atol=absolute)


def test_box_coder():
    figures, meta = stored("detection/box_coder.npz")
    box, target = given(meta["boxes"]), given(meta["targets"])
    deltas = 3 * given("dense_map(300, 24, 4)")
    deltas[:2] = torch.tensor([[0.0, 0, 50, -50], [40, -40, 5, 5]])
    for name, stds in meta["stds"].items():
        close(geometry.encode(box, target, stds), figures[f"encode_{name}"])
        close(geometry.decode(box, deltas, stds), figures[f"decode_{name}"], absolute=1e-3)
        close(geometry.decode(box, deltas, stds, (96, 160)), figures[f"clipped_{name}"], absolute=1e-3)
    every = geometry.decode(box, given(meta["deltas_all"]), STAGE_STDS[0], (96, 160))
    close(every[:, :40], figures["decode_all_classes"], absolute=1e-3)


def test_losses():
    figures, meta = stored("detection/losses.npz")
    pred = given("dense_boxes(32, 96, 160, seed=32, margin=0.1)")
    target = given("dense_boxes(32, 96, 160, seed=33)")
    pred[5] = 10
    target[:4], target[4] = pred[:4], pred[4] + 1
    pred.requires_grad_()
    giou = 10 * generalized_box_iou_loss(pred, target, eps=1e-6)
    close(giou.detach(), figures["giou"])
    (giou.sum() / 100).backward()
    close(pred.grad, figures["giou_grad"])
    close(geometry.overlaps(pred.detach(), target).diagonal(), figures["iou"])
    first, second = given("dense_map(310, 32, 4)"), 0.5 * given("dense_map(311, 32, 4)")
    masks = given("dense_map(316, 6, 80, 28, 28)")[torch.arange(6), labels(318, 80, 6)]
    found = {
        "giou_sum_over_100": giou.sum() / 100,
        "smooth_l1_avg_100": F.smooth_l1_loss(first, second, beta=1 / 9, reduction="sum") / 100,
        "l1_avg_100": F.smooth_l1_loss(first, second, beta=0.0, reduction="sum") / 100,
        "cls_avg_32": F.cross_entropy(given("dense_map(312, 32, 81)"), labels(313, 81, 32)),
        "rpn_cls_avg_64": F.binary_cross_entropy_with_logits(
            given("dense_map(314, 64)"), (labels(315, 4, 64) == 0).float()),
        "mask": F.binary_cross_entropy_with_logits(masks, (given("dense_map(317, 6, 28, 28)") > 0).float())}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(meta["values"], rel=1e-5)


def test_assignment():
    figures, meta = stored("detection/assign.npz")
    truths, grid = given(meta["gts"]), torch.cat(geometry.anchors(meta["feature_sizes"], CPU))
    inside = (grid[:, :2] >= 0).all(1) & (grid[:, 2] < 160) & (grid[:, 3] < 96)
    rpn = dict(positive=0.7, negative=0.3, low_quality=0.3)
    boxes = near(np.tile(truths.numpy(), (30, 1)), 6 * given("dense_map(42, 210, 4)"), 96, 160)
    exact = {"rpn_inside": inside, "rpn_cascade": geometry.assign(grid[inside], truths, **rpn),
             "rpn_mask_rcnn": geometry.assign(grid, truths, **rpn),
             "mask_rcnn_roi": geometry.assign(boxes, truths, positive=0.5, negative=0.5, low_quality=0.5)}
    for stage, least in enumerate((0.5, 0.6, 0.7)):
        exact[f"stage{stage}"] = geometry.assign(boxes, truths, positive=least, negative=least)
        close(geometry.overlaps(truths, boxes).amax(0), figures[f"stage{stage}_overlap"])
    for name, found in exact.items():
        np.testing.assert_array_equal(found, figures[name])


def test_masks():
    figures, meta = stored("detection/masks.npz")
    truths = given(meta["gt_boxes"]).numpy()
    rois = near(truths.repeat(3, 0), 5 * given("dense_map(71, 15, 4)"), 96, 160)
    masks = torch.from_numpy(dense_masks(truths, 96, 160))
    found = geometry.mask_targets(masks, torch.arange(5).repeat_interleave(3), rois)
    assert (found.numpy() != unpacked(figures["target"], 15, 28, 28)).mean() <= 1e-3
    smooth = F.avg_pool2d(given("dense_map(72, 8, 1, 28, 28)").sigmoid(), 5, 1, 2)[:, 0]
    pasted = geometry.paste(smooth, given("dense_boxes(8, 77, 131, seed=73)"), (77, 131)).numpy()
    assert (pasted != unpacked(figures["pasted"], 8, 77, 131)).mean() <= 1e-3
    assert np.abs(pasted.sum((1, 2)) - figures["pasted_area"]).max() <= 1e-3 * 77 * 131


def test_suppression_of_each_class():
    figures, _ = stored("detection/multiclass_nms.npz")
    box = given("dense_boxes(120, 96, 160, seed=60)")[:, None] + 2 * given("dense_map(602, 120, 80, 4)")
    scores = (2.5 * given("dense_map(601, 120, 81)")).softmax(1)
    found, score, label = geometry.best_of_each_class(box, scores)
    np.testing.assert_array_equal(label, figures["labels"])
    close(torch.cat([found, score[:, None]], 1), figures["dets"], absolute=1e-3)
    assert torch.equal(found, box.flatten(0, 1)[figures["flat"]])


def test_roi_features():
    figures, meta = stored("detection/roi_align.npz")
    box, features = dense_boxes(20, 96, 160, seed=50, margin=0.15), given(meta["feature"])
    box[:4] = [[3, 3, 3, 3], [-30, -20, -5, -4], [0, 0, 160, 96], [50.2, 20.3, 51.1, 20.9]]
    rois = torch.cat([(torch.arange(20) % 2)[:, None].float(), torch.from_numpy(box)], 1)
    close(roi_align(features, rois, 7, 0.25, sampling_ratio=-1, aligned=True), figures["out7"])
    close(roi_align(features[:, ::4], rois, 14, 0.25, sampling_ratio=-1, aligned=True), figures["out14"])
    figures, meta = stored("detection/roi_extract.npz")
    rois = torch.from_numpy(figures["rois"])
    np.testing.assert_array_equal(geometry.level_of(rois[:, 1:]), figures["level"])
    close(geometry.pool([given(call) for call in meta["features"]], rois, 7)[:, ::16], figures["out"])


@torch.no_grad()
def test_anchors_and_proposals():
    figures, meta = stored("detection/rpn.npz")
    levels = [given(call) for call in meta["inputs"]]
    logits, deltas = filled(published(meta["config"]).rpn_head, "rpn_head.")(levels)
    for i in range(5):
        close(logits[i], figures[f"cls{i}"], absolute=1e-4)
        close(deltas[i], figures[f"reg{i}"], absolute=1e-4)
    grid = geometry.anchors([x.shape[2:] for x in levels], CPU)
    close(torch.stack([level[:3] for level in grid]), figures["base"])
    close(torch.cat(grid), figures["priors"])
    scores = [x[0].permute(1, 2, 0).flatten() for x in logits]
    moves = [x[0].permute(1, 2, 0).reshape(-1, 4) for x in deltas]
    for name, per_level, count in (("proposals", 1000, 1000), ("proposals_small", 50, 40)):
        box, score = geometry.proposals(scores, moves, grid, (64, 96), per_level=per_level, count=count)
        distance = np.abs(torch.cat([box, score[:, None]], 1).numpy()[:, None] - figures[name])
        same = (distance[..., :4].max(-1) <= 1e-2) & (distance[..., 4] <= 1e-4)  # equal scores in any order
        assert len(box) == len(figures[name]) and same.any(1).all() and same.any(0).all()


@torch.no_grad()
@pytest.mark.parametrize("file", files("detection/roi_heads*"))
def test_roi_heads(file):
    figures, meta = stored(file)
    stages = published(meta["config"]).roi_head.stages
    for stage, (box, mask) in enumerate(stages):
        infix, suffix = (f"{stage}.", stage) if len(stages) > 1 else ("", "")
        logits, deltas = filled(box, f"roi_head.bbox_head.{infix}")(given(meta["features"]))
        pixels = filled(mask, f"roi_head.mask_head.{infix}")(given(meta["mask_features"]))[:, ::16]
        for found, name in ((logits, "cls"), (deltas, "reg"), (pixels, "mask")):
            close(found, figures[f"{name}{suffix}"], relative=1e-4, absolute=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("file", files("detection/detector*"))
def test_whole_detector(file):
    figures, meta = stored(file)
    model = filled(published(meta["config"]), factors=meta["factors"])
    size, original = tuple(meta["img_shape"]), tuple(meta["ori_shape"])
    image = torch.from_numpy(parity_input(1, *meta["pad_shape"]))
    image[:, :, size[0]:], image[..., size[1]:] = 0, 0
    own = given(meta["proposals_given"].partition(", score")[0])
    for prefix, proposals, pixels in (("", None, 2e-2), ("given_", own, 5e-3)):
        found, expected = model.detect(image, size, original, proposals), figures[f"{prefix}dets"]
        masks = unpacked(figures[f"{prefix}masks"], len(expected), *original)
        assert len(found.boxes) == len(expected)
        assert masks.sum(axis=(1, 2)).tolist() == figures[f"{prefix}areas"].tolist()
        mine = torch.cat([found.boxes, found.scores[:, None]], 1).numpy()
        for row, label, mask in zip(expected, figures[f"{prefix}labels"], masks):
            distance = np.abs(mine - row)
            same = (distance[:, :4].max(1) <= pixels) & (distance[:, 4] <= 1e-4)
            same &= found.labels.numpy() == label
            assert min((found.masks[i].numpy() != mask).mean() for i in same.nonzero()[0]) <= 1e-3
    levels = model.neck(model.backbone(image))
    same_sums(levels, figures["fpn_stat"], 1e-4)
    found = model.proposals(*model.rpn_head(levels), [size])[0]
    logits, deltas = model.roi_head.stages[0][0](geometry.pool(levels, rois_of([own]), 7))
    assert len(found) == figures["rpn_count"]
    distance = np.abs(found.numpy() - figures["rpn"][:, None, :4]).max(-1)
    assert distance.min(1).max() <= 1e-2  # scores: test_anchors_and_proposals
    close(logits[:12], figures["stage0_cls"], 1e-4, 1e-4)
    close(deltas[:12], figures["stage0_reg"], 1e-4, 1e-4)
    if "stage1_rois" in figures:
        moved = rois_of([refined(own, logits[:, :-1].argmax(1), deltas, 0, size)])
        close(moved, figures["stage1_rois"], 0, 5e-3)


@torch.no_grad()
@pytest.mark.parametrize("row", stored("detection/train_losses.json"), ids=["cascade", "mask_rcnn"])
def test_training_losses(row):
    model = filled(published(row["config"]), factors=row["factors"])
    model.rules = replace(model.rules, anchor_samples=10 ** 6, roi_samples=10 ** 6)
    height, width = row["pad_shapes"][0]
    values = torch.from_numpy(parity_input(2, height, width))
    images, truths, proposals = torch.zeros_like(values), [], []
    for i, (h, w) in enumerate(row["img_shapes"]):
        images[i, :, :h, :w] = values[i, :, :h, :w]
        box = dense_boxes(4, h, w, seed=90 + i)
        masks = torch.from_numpy(dense_masks(box, height, width))
        truths.append(Truth(torch.from_numpy(box), labels(92 + i, 80, 4), masks, (h, w), (0, 0, i)))
        moved = near(box.repeat(5, 0), 3 * given(f"dense_map({96 + i}, 20, 4)"), h, w)
        proposals.append(torch.cat([given(f"dense_boxes(80, {h}, {w}, seed={94 + i})"), moved]))
    levels = model.neck(model.backbone(images))
    losses = rpn_losses(model.rules, *model.rpn_head(levels), truths)
    losses |= roi_losses(model.rules, model.roi_head.stages, levels, proposals, truths)
    assert losses.keys() == row["losses"].keys()
    for name, expected in row["losses"].items():
        close(losses[name], expected, relative=1e-3, absolute=1e-6)
