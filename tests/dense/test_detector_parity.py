"""Single functions, heads, whole detectors and training losses of detection give the published system's figures."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, roi_align

from dense import boxes as geometry
from dense.detector_losses import STAGE_STDS, Truth, refined, roi_losses, rois_of, rpn_losses
from tests.kits.dense import dense_boxes, dense_map, dense_masks, filled, published, stored
from tests.kits.fill import parity_input


def maps(*seeds: int, shape: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return [torch.from_numpy(dense_map(seed, *shape)) for seed in seeds]


def boxes(*args, **kwargs) -> torch.Tensor:
    return torch.from_numpy(dense_boxes(*args, **kwargs))


def corners_sorted(values: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Boxes clipped to an image, x1 <= x2 and y1 <= y2."""
    values = values.clip(0, [width, height, width, height]).reshape(-1, 2, 2)
    return torch.from_numpy(np.sort(values, axis=1).reshape(-1, 4).astype(np.float32))


def close(found, expected, relative: float = 1e-5, absolute: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=relative, atol=absolute)


def test_box_coder():
    figures, meta = stored("detection/box_coder.npz")
    box, target = boxes(24, 96, 160, seed=30), boxes(24, 96, 160, seed=31)
    deltas = 3 * dense_map(300, 24, 4)
    deltas[0], deltas[1] = [0, 0, 50, -50], [40, -40, 5, 5]
    deltas = torch.from_numpy(deltas)
    for name, stds in meta["stds"].items():
        close(geometry.encode(box, target, stds), figures[f"encode_{name}"])
        close(geometry.decode(box, deltas, stds), figures[f"decode_{name}"], absolute=1e-3)
        close(geometry.decode(box, deltas, stds, (96, 160)), figures[f"clipped_{name}"], absolute=1e-3)
    every = geometry.decode(box, maps(301, shape=(24, 320))[0], STAGE_STDS[0], (96, 160))
    close(every[:, :40], figures["decode_all_classes"], absolute=1e-3)


def test_losses():
    figures, meta = stored("detection/losses.npz")
    pred = boxes(32, 96, 160, seed=32, margin=0.1)
    pred[5] = 10
    target = boxes(32, 96, 160, seed=33)
    target[:4], target[4] = pred[:4], pred[4] + 1
    pred.requires_grad_()
    giou = 10 * generalized_box_iou_loss(pred, target, eps=1e-6)
    close(giou.detach(), figures["giou"])
    (giou.sum() / 100).backward()
    close(pred.grad, figures["giou_grad"])
    close(geometry.overlaps(pred.detach(), target).diagonal(), figures["iou"])
    first, second = maps(310, 311, shape=(32, 4))
    labels, codes = (torch.from_numpy(np.random.default_rng(seed).integers(0, end, count))
                     for seed, end, count in ((313, 81, 32), (315, 4, 64)))
    channel = torch.from_numpy(np.random.default_rng(318).integers(0, 80, 6))
    logits, anchors, masks, shown = (maps(seed, shape=shape)[0] for seed, shape in (
        (312, (32, 81)), (314, (64, 1)), (316, (6, 80, 28, 28)), (317, (6, 28, 28))))
    found = {"giou_sum_over_100": giou.sum() / 100, "cls_avg_32": F.cross_entropy(logits, labels),
             "rpn_cls_avg_64": F.binary_cross_entropy_with_logits(anchors[:, 0], (codes == 0).float()),
             "mask": F.binary_cross_entropy_with_logits(masks[torch.arange(6), channel], (shown > 0).float())}
    for name, beta in (("smooth_l1_avg_100", 1 / 9), ("l1_avg_100", 0.0)):
        found[name] = F.smooth_l1_loss(first, 0.5 * second, beta=beta, reduction="sum") / 100
    assert {name: value.item() for name, value in found.items()} == pytest.approx(meta["values"], rel=1e-5)


def test_assignment():
    figures, meta = stored("detection/assign.npz")
    truths = boxes(7, 96, 160, seed=40)
    grid = torch.cat(geometry.anchors(meta["feature_sizes"], torch.device("cpu")))
    inside = (grid[:, :2] >= 0).all(1) & (grid[:, 2] < 160) & (grid[:, 3] < 96)
    np.testing.assert_array_equal(inside, figures["rpn_inside"])
    rpn = dict(positive=0.7, negative=0.3, low_quality=0.3)
    np.testing.assert_array_equal(geometry.assign(grid[inside], truths, **rpn), figures["rpn_cascade"])
    np.testing.assert_array_equal(geometry.assign(grid, truths, **rpn), figures["rpn_mask_rcnn"])
    near = corners_sorted(np.tile(truths.numpy(), (30, 1)) + 6 * dense_map(42, 210, 4), 96, 160)
    for stage, least in enumerate((0.5, 0.6, 0.7)):
        found = geometry.assign(near, truths, positive=least, negative=least)
        np.testing.assert_array_equal(found, figures[f"stage{stage}"])
        close(geometry.overlaps(truths, near).amax(0), figures[f"stage{stage}_overlap"])
    found = geometry.assign(near, truths, positive=0.5, negative=0.5, low_quality=0.5)
    np.testing.assert_array_equal(found, figures["mask_rcnn_roi"])


def test_masks():
    figures, _ = stored("detection/masks.npz")
    truths = dense_boxes(5, 96, 160, seed=70)
    rois = corners_sorted(truths.repeat(3, 0) + 5 * dense_map(71, 15, 4), 96, 160)
    masks = torch.from_numpy(dense_masks(truths, 96, 160))
    found = geometry.mask_targets(masks, torch.arange(5).repeat_interleave(3), rois)
    expected = np.unpackbits(figures["target"])[:found.numel()].reshape(found.shape)
    assert (found.numpy() != expected).mean() <= 1e-3
    smooth = F.avg_pool2d(maps(72, shape=(8, 1, 28, 28))[0].sigmoid(), 5, 1, 2)[:, 0]
    pasted = geometry.paste(smooth, boxes(8, 77, 131, seed=73), (77, 131))
    expected = np.unpackbits(figures["pasted"])[:pasted.numel()].reshape(pasted.shape)
    assert (pasted.numpy() != expected).mean() <= 1e-3
    assert np.abs(pasted.sum((1, 2)).numpy() - figures["pasted_area"]).max() <= 1e-3 * 77 * 131


def test_suppression_of_each_class():
    figures, _ = stored("detection/multiclass_nms.npz")
    box = torch.from_numpy(dense_boxes(120, 96, 160, seed=60)[:, None] + 2 * dense_map(602, 120, 80, 4))
    scores = (2.5 * maps(601, shape=(120, 81))[0]).softmax(1)
    found, score, labels = geometry.best_of_each_class(box, scores)
    np.testing.assert_array_equal(labels, figures["labels"])
    close(torch.cat([found, score[:, None]], 1), figures["dets"], absolute=1e-3)
    assert torch.equal(found, box.flatten(0, 1)[figures["flat"]])


def test_roi_features():
    figures, _ = stored("detection/roi_align.npz")
    box = dense_boxes(20, 96, 160, seed=50, margin=0.15)
    box[:4] = [[3, 3, 3, 3], [-30, -20, -5, -4], [0, 0, 160, 96], [50.2, 20.3, 51.1, 20.9]]
    rois = torch.cat([(torch.arange(20) % 2)[:, None].float(), torch.from_numpy(box)], 1)
    features, = maps(400, shape=(2, 8, 24, 40))
    close(roi_align(features, rois, 7, 0.25, sampling_ratio=-1, aligned=True), figures["out7"])
    close(roi_align(features[:, ::4], rois, 14, 0.25, sampling_ratio=-1, aligned=True), figures["out14"])
    figures, _ = stored("detection/roi_extract.npz")
    rois = torch.from_numpy(figures["rois"])
    np.testing.assert_array_equal(geometry.level_of(rois[:, 1:]), figures["level"])
    levels = [maps(410 + i, shape=(1, 256, -(-24 // 2 ** i), 40 // 2 ** i))[0] for i in range(4)]
    close(geometry.pool(levels, rois, 7)[:, ::16], figures["out"])


def test_anchors_and_proposals():
    figures, meta = stored("detection/rpn.npz")
    head = filled(published(meta["config"]).rpn_head, "rpn_head.")
    sides = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    levels = [torch.from_numpy(dense_map(200 + i, 1, 256, *side)) for i, side in enumerate(sides)]
    with torch.no_grad():
        logits, deltas = head(levels)
    for i in range(5):
        close(logits[i], figures[f"cls{i}"], absolute=1e-4)
        close(deltas[i], figures[f"reg{i}"], absolute=1e-4)
    grid = geometry.anchors(sides, torch.device("cpu"))
    close(torch.stack([level[:3] for level in grid]), figures["base"])
    close(torch.cat(grid), figures["priors"])
    scores = [x[0].permute(1, 2, 0).flatten() for x in logits]
    moves = [x[0].permute(1, 2, 0).reshape(-1, 4) for x in deltas]
    for name, per_level, count in (("proposals", 1000, 1000), ("proposals_small", 50, 40)):
        box, score = geometry.proposals(scores, moves, grid, (64, 96), per_level=per_level, count=count)
        same_boxes(torch.cat([box, score[:, None]], 1).numpy(), figures[name], 1e-2)


def same_boxes(found: np.ndarray, expected: np.ndarray, pixels: float, score: float = 1e-4) -> None:
    """Rows of box and score are the same set: equal scores may stand in another order."""
    assert len(found) == len(expected)
    distance = np.abs(found[:, None] - expected[None])
    near = (distance[..., :4].max(-1) <= pixels) & (distance[..., 4] <= score)
    assert near.any(1).all() and near.any(0).all()


def test_roi_heads():
    for system in ("cascade", "mask_rcnn"):
        figures, meta = stored(f"detection/roi_heads_{system}.npz")
        stages = published(meta["config"]).roi_head.stages
        for stage, (box, mask) in enumerate(stages):
            infix, suffix = (f"{stage}.", stage) if len(stages) > 1 else ("", "")
            with torch.no_grad():
                logits, deltas = filled(box, f"roi_head.bbox_head.{infix}")(maps(500, shape=(6, 256, 7, 7))[0])
                pixels = filled(mask, f"roi_head.mask_head.{infix}")(maps(501, shape=(3, 256, 14, 14))[0])
            for found, name in ((logits, "cls"), (deltas, "reg"), (pixels[:, ::16], "mask")):
                close(found, figures[f"{name}{suffix}"], relative=1e-4, absolute=1e-4)


@pytest.mark.parametrize("file", ["detector_cascade_mask_rcnn_hornet_tiny_7x7_96x160",
                                  "detector_horfpn_7x7_mask_rcnn_hornet_small_7x7_96x128"])
def test_whole_detector(file):
    figures, meta = stored(f"detection/{file}.npz")
    model = filled(published(meta["config"]), factors=meta["factors"])
    size, original = tuple(meta["img_shape"]), tuple(meta["ori_shape"])
    image = torch.zeros(1, 3, *meta["pad_shape"])
    image[:, :, :size[0], :size[1]] = torch.from_numpy(parity_input(1, *meta["pad_shape"]))[:, :, :size[0], :size[1]]
    given = boxes(60, *size, seed=80)
    for prefix, proposals, pixels in (("", None, 2e-2), ("given_", given, 5e-3)):
        found = model.detect(image, size, original, proposals)
        expected, labels = figures[f"{prefix}dets"], figures[f"{prefix}labels"]
        masks = np.unpackbits(figures[f"{prefix}masks"])[:len(labels) * original[0] * original[1]]
        masks = masks.reshape(-1, *original)
        assert len(found.boxes) == len(expected)
        mine = torch.cat([found.boxes, found.scores[:, None]], 1).numpy()
        for row, label, mask in zip(expected, labels, masks):
            distance = np.abs(mine - row)
            near = (found.labels.numpy() == label) & (distance[:, :4].max(1) <= pixels) & (distance[:, 4] <= 1e-4)
            assert near.any()
            assert min((found.masks[i].numpy() != mask).mean() for i in near.nonzero()[0]) <= 1e-3
        assert masks.sum(axis=(1, 2)).tolist() == figures[f"{prefix}areas"].tolist()
    with torch.no_grad():
        levels = model.neck(model.backbone(image))
        own = model.proposals(*model.rpn_head(levels), [size])[0]
        logits, deltas = model.roi_head.stages[0][0](geometry.pool(levels, rois_of([given]), 7))
    assert len(own) == figures["rpn_count"]
    distance = np.abs(own.numpy() - figures["rpn"][:, None, :4]).max(-1)
    assert distance.min(1).max() <= 1e-2  # scores: in test_anchors_and_proposals
    for x, (total, norm) in zip(levels, figures["fpn_stat"], strict=True):
        assert x.double().sum().item() == pytest.approx(total, abs=1e-4 * x.numel())
        assert x.double().norm().item() == pytest.approx(norm, rel=1e-5)
    close(logits[:12], figures["stage0_cls"], 1e-4, 1e-4)
    close(deltas[:12], figures["stage0_reg"], 1e-4, 1e-4)
    if "stage1_rois" in figures:
        close(refined(given, logits[:, :-1].argmax(1), deltas, 0, size), figures["stage1_rois"][:, 1:], 0, 5e-3)


@pytest.mark.parametrize("row", stored("detection/train_losses.json"),
                         ids=["cascade", "mask_rcnn"])
def test_training_losses(row):
    model = filled(published(row["config"]), factors=row["factors"])
    model.rules = replace(model.rules, anchor_samples=10 ** 6, roi_samples=10 ** 6)
    batch, height, width = 2, *row["pad_shapes"][0]
    values = torch.from_numpy(parity_input(batch, height, width))
    images, truths, proposals = torch.zeros_like(values), [], []
    for i, (h, w) in enumerate(row["img_shapes"]):
        images[i, :, :h, :w] = values[i, :, :h, :w]
        box = dense_boxes(4, h, w, seed=90 + i)
        labels = np.random.default_rng(92 + i).integers(0, 80, 4)
        truths.append(Truth(torch.from_numpy(box), torch.from_numpy(labels),
                            torch.from_numpy(dense_masks(box, height, width)), (h, w), (0, 0, i)))
        near = corners_sorted(box.repeat(5, 0) + 3 * dense_map(96 + i, 20, 4), h, w)
        proposals.append(torch.cat([boxes(80, h, w, seed=94 + i), near]))
    with torch.no_grad():
        levels = model.neck(model.backbone(images))
        losses = rpn_losses(model.rules, *model.rpn_head(levels), truths)
        losses |= roi_losses(model.rules, model.roi_head.stages, levels, proposals, truths)
    assert losses.keys() == row["losses"].keys()
    for name, expected in row["losses"].items():
        close(losses[name], expected, relative=1e-3, absolute=1e-6)
