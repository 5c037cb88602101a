"""Backbone, necks and heads give the published figures (computed by the authors' own modules)."""
import numpy as np
import pytest
import torch

from dense.backbone import Backbone
from dense.necks import FPN, HORFPN_FILTER
from dense.segmentor import AuxiliaryHead, UPerHead
from tests.kits.dense import filled, given, stored

LARGE = ((24, 13), (12, 7))


def close(found, expected, stat, tolerance):
    for x, name, (_, norm) in zip(found, sorted(expected), stat):
        step = x.shape[1] // expected[name].shape[1]
        assert np.abs(x[:, ::step].numpy() - expected[name]).max() < tolerance, name
        assert x.double().norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name, filters", [
    ("tiny_7x7_seg_64x96", None), ("tiny_gf_seg_72x104", LARGE), ("tiny_gf_det_96x160", None),
    ("tiny_gf_det_256x320", None), ("tiny_gf_eps_64x96", LARGE)])
def test_backbone(name, filters):
    arrays, meta = stored(f"backbone/{name}.npz")
    backbone = filled(Backbone("hornet_tiny_gf" if "_gf" in name else "hornet_tiny_7x7", filters), "backbone.")
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            for ending, factor in meta.get("factors", {}).items():
                if key.endswith(ending):
                    value.mul_(factor)
        maps = backbone(given(meta["input"]))
    close(maps, {k: v for k, v in arrays.items() if k != "stat"}, arrays["stat"], 5e-5)


@pytest.mark.parametrize("name, filter, tolerance", [
    ("fpn_16x24", None, 1e-4), ("gnfpn_7x7_16x24", "conv", 5e-4), ("gnfpn_gf_15x21", HORFPN_FILTER, 5e-5),
    ("gnfpn_gf_48x40", HORFPN_FILTER, 5e-5)])
def test_necks(name, filter, tolerance):
    arrays, meta = stored(f"heads/{name}.npz")
    maps = [given(call) for call in meta["inputs"]]
    with torch.no_grad():
        found = filled(FPN([x.shape[1] for x in maps], filter), "neck.")(maps)
    outputs = {k: v for k, v in arrays.items() if k != "stat"}
    close(found, outputs, arrays["stat"], tolerance)
    assert len(found) == len(outputs) == 5


@pytest.mark.parametrize("name, filter", [
    ("uper_tiny_16x24", None), ("gnuper_7x7_small_18x26", "conv"), ("gnuper_gf_small_16x24", HORFPN_FILTER)])
def test_segmentation_heads(name, filter):
    arrays, meta = stored(f"heads/{name}.npz")
    maps = [given(call) for call in meta["inputs"]]
    head = filled(UPerHead([x.shape[1] for x in maps], 150, filter), "decode_head.")
    auxiliary = filled(AuxiliaryHead(maps[2].shape[1], 150), "auxiliary_head.")
    with torch.no_grad():
        decode, aux, psp = head(maps), auxiliary(maps[2]), head.pyramid(maps[3])
    assert np.abs(decode[:, ::meta["class_step"]].numpy() - arrays["decode"]).max() < 2e-5
    assert np.abs(aux.numpy() - arrays["aux"]).max() < 2e-5
    assert np.abs(psp[:, ::8].numpy() - arrays["psp"]).max() < 2e-5
