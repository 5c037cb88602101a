"""Every model variant in one row: architecture, figures, published files. Plain data, without torch.

From these rows `models.hornet` registers the models, and the help of `--model`, README's table and
`python -m tools.zoo list` are made. A new variant is one row here, and its recipe of that name in recipes/.

Figures: "HorNet", NeurIPS 2022, arXiv:2207.14284 (parameters, FLOPs, recipes); top-1 and top-5 with two
decimals as measured by OpenMMLab on the authors' weights, `authors_top1` as printed in the authors' README.
"""
from dataclasses import dataclass

from common.synsets import imagenet_synsets, published_22k_synsets


@dataclass(frozen=True)
class HorNetConfig:
    """An architecture; each field can be overridden by name in `timm.create_model`.

    Attributes:
        width: channels of the first stage, doubled at each of the three others.
        depths: blocks per stage.
        orders: gnConv order per stage.
        filters: per stage "conv", or the grid (h, w) of the global-local filter.
        kernel_size: of the depthwise convolutions.
        scale: gnConv's s.
    """

    width: int = 64
    depths: tuple[int, ...] = (2, 3, 18, 2)
    orders: tuple[int, ...] = (2, 3, 4, 5)
    filters: tuple[str | tuple[int, int], ...] = ("conv", "conv", "conv", "conv")
    kernel_size: int = 7
    scale: float = 1 / 3

    def __post_init__(self):
        for name in ("depths", "orders", "filters"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != 4:
                raise ValueError(f"HorNet {name} {value!r}: four values are needed, one per stage")


@dataclass(frozen=True)
class PublishedFile:
    """One downloadable file; `sha256_prefix` is "" where none is published."""

    name: str
    url: str
    sha256_prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model.

    Attributes:
        config: architecture.
        input_size: side in pixels of the square images it is meant for.
        params: parameters with a 1000-class head.
        flops: multiply-adds of one image at `input_size`.
        top1, top5: percent on ImageNet-1k's 50,000 validation images (OpenMMLab), None where not published.
        authors_top1: the authors' figure, one decimal.
        classes: of the published file's head, 10459 for ImageNet-22k.
        published: False for variants of this project alone.
        files: where the weights are, the one with a published hash first.
    """

    config: HorNetConfig
    params: int
    flops: float
    input_size: int = 224
    top1: float | None = None
    top5: float | None = None
    authors_top1: float | None = None
    classes: int = 1000
    published: bool = True
    files: tuple[PublishedFile, ...] = ()


def _files(name: str, authors_id: str, openmmlab_sha256: str = "") -> tuple[PublishedFile, ...]:
    """OpenMMLab's file, whose name ends in its sha256's first digits, and the authors' (`name` is ours)."""
    authors = PublishedFile(f"{name}.pth", f"https://cloud.tsinghua.edu.cn/f/{authors_id}/?dl=1")
    if not openmmlab_sha256:
        return (authors,)
    theirs = name.removesuffix("_7x7").replace("_", "-") + f"_3rdparty_in1k_20220915-{openmmlab_sha256}.pth"
    url = f"https://download.openmmlab.com/mmclassification/v0/hornet/{theirs}"
    return PublishedFile(theirs, url, openmmlab_sha256), authors


# Global-local filters in stages 3 and 4, at the sizes of their feature maps.
_GF224 = ("conv", "conv", (14, 8), (7, 4))
_GF384 = ("conv", "conv", (24, 13), (12, 7))
_GF64 = ("conv", "conv", (4, 3), (2, 2))

VARIANTS = {
    "hornet_tiny_7x7": Variant(
        config=HorNetConfig(64), params=22_409_512, flops=3.976e9, top1=82.84, top5=96.24,
        authors_top1=82.8, files=_files("hornet_tiny_7x7", "bac9690c72944d19aca1", "0e8eedff")),
    "hornet_tiny_gf": Variant(
        config=HorNetConfig(64, filters=_GF224), params=22_991_848, flops=3.896e9, top1=82.98, top5=96.38,
        authors_top1=83.0, files=_files("hornet_tiny_gf", "460e759c82324ea6bfa3", "4c35a66b")),
    "hornet_small_7x7": Variant(
        config=HorNetConfig(96), params=49_528_264, flops=8.826e9, top1=83.79, top5=96.75,
        authors_top1=83.8, files=_files("hornet_small_7x7", "8ef64277da0e469ea857", "5935f60f")),
    "hornet_small_gf": Variant(
        config=HorNetConfig(96, filters=_GF224), params=50_401_768, flops=8.706e9, top1=83.98, top5=96.77,
        authors_top1=84.0, files=_files("hornet_small_gf", "959603ca287d4c09ad49", "649ca492")),
    "hornet_base_7x7": Variant(
        config=HorNetConfig(128), params=87_256_680, flops=15.583e9, top1=84.24, top5=96.94,
        authors_top1=84.2, files=_files("hornet_base_7x7", "13a748487711492e9704", "a06176bb")),
    "hornet_base_gf": Variant(
        config=HorNetConfig(128, filters=_GF224), params=88_421_352, flops=15.423e9, top1=84.32, top5=96.95,
        authors_top1=84.3, files=_files("hornet_base_gf", "c212d1d8a3914b47a5c1", "82c06fa7")),
    "hornet_base_gf_img384": Variant(  # its FLOPs are counted here, not published
        config=HorNetConfig(128, filters=_GF384), input_size=384, params=92_099_560, flops=45.3e9),
    "hornet_large_7x7": Variant(
        config=HorNetConfig(192), params=194_542_504, flops=34.8e9, classes=10459,
        files=_files("hornet_large_7x7_22k", "c2fc23caae084a3aa73d")),
    "hornet_large_gf": Variant(
        config=HorNetConfig(192, filters=_GF224), params=196_289_512, flops=34.7e9, classes=10459,
        files=_files("hornet_large_gf_22k", "8600206ebdfa485f98d0")),
    "hornet_large_gf_img384": Variant(
        config=HorNetConfig(192, filters=_GF384), input_size=384, params=201_806_824, flops=101.8e9,
        classes=10459, files=_files("hornet_large_gf_img384_22k", "eec48d5eca5a48d98fd2")),
    # Of this project alone: the same structure, small enough for a laptop (nano) and for tests (pico).
    "hornet_nano_7x7": Variant(config=HorNetConfig(32, (1, 1, 3, 1)), input_size=64,
                               params=1_909_192, flops=22.12e6, published=False),
    "hornet_nano_gf": Variant(config=HorNetConfig(32, (1, 1, 3, 1), filters=_GF64), input_size=64,
                              params=1_869_352, flops=21.52e6, published=False),
    "hornet_pico_7x7": Variant(config=HorNetConfig(8, (1, 1, 1, 1)), input_size=64,
                               params=153_024, flops=1.331e6, published=False),
    "hornet_pico_gf": Variant(config=HorNetConfig(8, (1, 1, 1, 1), filters=_GF64), input_size=64,
                              params=146_604, flops=1.266e6, published=False),
}
MODEL_NAMES = tuple(VARIANTS)
PUBLISHED = {name: variant for name, variant in VARIANTS.items() if variant.published}


def synsets(classes: int) -> tuple[str, ...] | None:
    """WordNet synsets in the order of the published heads with 1000 or 10,459 rows; None for other heads."""
    return {1000: imagenet_synsets, 10459: published_22k_synsets}.get(classes, lambda: None)()


def default_classes(classes: int) -> list[str]:
    """Names for the classes of a head whose file has none: the published head's synsets, else numbers."""
    return list(synsets(classes) or map(str, range(classes)))
