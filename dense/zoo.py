"""The published segmentors and detectors: architecture, figures, files. Plain data, without torch.

Figures are those of the authors' README (github.com/raoyongming/HorNet, commit ac9e210); none was rerun here.
HorFPN's are in the paper alone (arXiv:2207.14284), without files.
"""
from dataclasses import dataclass

ADDRESS = "https://cloud.tsinghua.edu.cn/f/{}/?dl=1"
# How features are joined: None for 3x3 convolutions, else the operator of HorFPN's gnConv layers.
HEADS: dict[str, str | tuple[int, int] | None] = {"plain": None, "horfpn_7x7": "conv", "horfpn_gf": (32, 17)}
_SEGMENTATION_FILTERS = ((24, 13), (12, 7))


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published segmentor on ADE20K, or detector on COCO.

    Attributes:
        config: the authors' name.
        model: of the HorNet.
        head: a name in HEADS.
        system: of a detector, "" of a segmentor.
        params: with 150 or 80 classes.
        miou, miou_ms: percent, at one scale, and at six scales with flips; None where none is published.
        box_ap, mask_ap: percent.
        gflops: for an image of 512x2048 (640x2560 for large models), detectors 1280x800, as published.
        crop: side of crops and windows; a window moves by two thirds of it.
        file: ID in ADDRESS, "" where there is none.
    """
    config: str
    model: str
    head: str = "plain"
    system: str = ""
    params: int
    miou: float | None = None
    miou_ms: float | None = None
    box_ap: float | None = None
    mask_ap: float | None = None
    gflops: int | None = None
    crop: int = 512
    file: str = ""


def _upernet(size: str, kind: str, params: int, miou: float, miou_ms: float, gflops: int, file: str
             ) -> Published:
    crop = 640 if size == "large" else 512
    return Published(
        config=f"upernet_hornet_{size}_{kind}_{crop}_160k_ade20k", model=f"hornet_{size}_{kind}",
        params=params, miou=miou, miou_ms=miou_ms, gflops=gflops, crop=crop, file=file)


def _horfpn(kind: str, params: int) -> Published:
    return Published(config=f"horfpn_{kind}_upernet_hornet_small_7x7_512_160k_ade20k",
                     model="hornet_small_7x7", head=f"horfpn_{kind}", params=params)


SEGMENTORS = {
    "upernet_tiny_7x7": _upernet("tiny", "7x7", 52_205_036, 48.1, 48.9, 926, "684334b0a7ea436b9a97"),
    "upernet_tiny_gf": _upernet("tiny", "gf", 54_626_476, 49.2, 49.3, 924, "34725e1401194786bb76"),
    "upernet_small_7x7": _upernet("small", "7x7", 81_181_772, 49.2, 49.8, 1030, "0e488e21a88d414da90c"),
    "upernet_small_gf": _upernet("small", "gf", 84_813_932, 50.0, 50.5, 1027, "d37290faa8a34bc091c3"),
    "upernet_base_7x7": _upernet("base", "7x7", 120_768_172, 50.0, 50.5, 1174, "98288e9023c2425a880c"),
    # The published table says 640 for its crop; the configuration and the FLOPs say 512.
    "upernet_base_gf": _upernet("base", "gf", 125_611_052, 50.5, 50.9, 1171, "e50ecead21e4408187b7"),
    "upernet_large_7x7": _upernet("large", "7x7", 231_769_964, 54.1, 54.5, 2473, "d7a782e07a354f59bf62"),
    "upernet_large_gf": _upernet("large", "gf", 239_034_284, 55.0, 55.2, 2465, "3dbb38bae1694653a666"),
    "horfpn_small_7x7": _horfpn("7x7", 74_275_404),
    "horfpn_small_gf": _horfpn("gf", 74_661_324),
}


def segmentor_filters(model: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The grids of a backbone's filters in segmentation: every published GF model has those for 384 pixels,
    whatever its width; None: as in classification."""
    from models.zoo import VARIANTS  # imports PyTorch, and options are parsed without it

    variant = VARIANTS[model]
    return _SEGMENTATION_FILTERS if variant.published and variant.config.filters[2] != "conv" else None


def _cascade(size: str, kind: str, params: int, box_ap: float, mask_ap: float, gflops: int,
             file: str) -> Published:
    data = "in22k" if size == "large" else "in1k"
    return Published(config=f"cascade_mask_rcnn_hornet_{size}_{kind}_3x_coco_{data}", params=params,
                     model=f"hornet_{size}_{kind}", system="cascade_mask_rcnn", box_ap=box_ap,
                     mask_ap=mask_ap, gflops=gflops, file=file)


def _mask_rcnn(head: str, params: int) -> Published:
    name = "fpn" if head == "plain" else head
    return Published(config=f"{name}_mask_rcnn_hornet_small_7x7_1x_coco_in1k", params=params, head=head,
                     model="hornet_small_7x7", system="mask_rcnn")


DETECTORS = {
    "cascade_tiny_7x7": _cascade("tiny", "7x7", 79_883_634, 51.7, 44.8, 730, "19daa3854a6b4c75bf23"),
    "cascade_tiny_gf": _cascade("tiny", "gf", 80_465_970, 52.4, 45.6, 728, "1ca353fb6ac44b54a2d8"),
    "cascade_small_7x7": _cascade("small", "7x7", 106_869_714, 52.7, 45.6, 830, "6af0439735dc473f8646"),
    "cascade_small_gf": _cascade("small", "gf", 107_743_218, 53.3, 46.3, 827, "fd9a3127b18f404d8e95"),
    "cascade_base_7x7": _cascade("base", "7x7", 144_465_458, 53.3, 46.1, 969, "324de62466a848129e19"),
    "cascade_base_gf": _cascade("base", "gf", 145_630_130, 54.0, 46.9, 965, "97d8587c8a0248fcac19"),
    "cascade_large_7x7": _cascade("large", "7x7", 251_485_938, 55.4, 48.0, 1363, "975af666e64840588e3e"),
    "cascade_large_gf": _cascade("large", "gf", 258_750_258, 56.0, 48.6, 1358, "597f655fe9b84d50bffb"),
    "fpn_small_7x7": _mask_rcnn("plain", 69_034_512),
    "horfpn_7x7_small_7x7": _mask_rcnn("horfpn_7x7", 67_672_592),
    "horfpn_gf_small_7x7": _mask_rcnn("horfpn_gf", 68_444_432),
}


def detector_filters(model: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The grids of a backbone's filters in detection: those for 384 pixels in the large GF model alone."""
    return _SEGMENTATION_FILTERS if model.startswith("hornet_large_gf") else None
