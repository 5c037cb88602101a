"""Functions, heads, whole detectors and training losses of detection give the published figures."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, roi_align

from dense import boxes as geometry
from dense.detector_losses import STAGE_STDS, Truth, refined, roi_losses, rois_of, rpn_losses
from tests.kits.dense import dense_boxes, dense_masks, filled, given, published, same_sums, stored
from tests.kits.fill import parity_input

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


def same_boxes(found: np.ndarray, expected: np.ndarray, pixels: float) -> None:
    """Rows of box and score are the same set: equal scores may stand in another order."""
    distance = np.abs(found[:, None] - expected[None])
    same = (distance[..., :4].max(-1) <= pixels) & (distance[..., 4] <= 1e-4)
    assert len(found) == len(expected) and same.any(1).all() and same.any(0).all()


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
        same_boxes(torch.cat([box, score[:, None]], 1).numpy(), figures[name], 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("system", ["cascade", "mask_rcnn"])
def test_roi_heads(system):
    figures, meta = stored(f"detection/roi_heads_{system}.npz")
    stages = published(meta["config"]).roi_head.stages
    for stage, (box, mask) in enumerate(stages):
        infix, suffix = (f"{stage}.", stage) if len(stages) > 1 else ("", "")
        logits, deltas = filled(box, f"roi_head.bbox_head.{infix}")(given(meta["features"]))
        pixels = filled(mask, f"roi_head.mask_head.{infix}")(given(meta["mask_features"]))[:, ::16]
        for found, name in ((logits, "cls"), (deltas, "reg"), (pixels, "mask")):
            close(found, figures[f"{name}{suffix}"], relative=1e-4, absolute=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("file", ["cascade_mask_rcnn_hornet_tiny_7x7_96x160",
                                  "horfpn_7x7_mask_rcnn_hornet_small_7x7_96x128"])
def test_whole_detector(file):
    figures, meta = stored(f"detection/detector_{file}.npz")
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
