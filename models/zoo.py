"""Published results and files: plain data and two small look-ups.

Figures: "HorNet", NeurIPS 2022, arXiv:2207.14284 (parameters, FLOPs, recipes); top-1 and top-5 with two decimals
as measured by OpenMMLab on the authors' weights, `authors_top1` as printed in the authors' README.
"""
from dataclasses import dataclass

from common.synsets import imagenet_synsets, published_22k_synsets

AUTHORS_URL = "https://cloud.tsinghua.edu.cn/f/{}/?dl=1"
OPENMMLAB_URL = "https://download.openmmlab.com/mmclassification/v0/hornet/{}"


@dataclass(frozen=True)
class PublishedFile:
    """One downloadable file; `sha256_prefix` is "" where none is published (it is then pinned on first use)."""

    source: str
    name: str
    url: str
    sha256_prefix: str = ""


@dataclass(frozen=True)
class Published:
    """What is published of one model.

    Attributes:
        params: parameters with a 1000-class head.
        flops: multiply-adds at `input_size`, None where not published.
        input_size: side of the square pictures in pixels.
        classes: of the published file's head, 10459 for ImageNet-22k.
        recipe: file name stem in recipes/ of the training that made the published file, "" where none is known.
        drop_path, clip_grad: that recipe's values.
        top1, top5: percent on ImageNet-1k's 50,000 validation pictures (OpenMMLab), None where not published.
        authors_top1: the authors' figure, one decimal.
        authors_id: of the file at the authors' server, "" for none.
        openmmlab_file: file name at OpenMMLab, "" for none; its last eight hex digits begin the file's sha256.
    """

    params: int
    flops: float | None
    input_size: int
    classes: int
    recipe: str
    drop_path: float | None = None
    clip_grad: float | None = None
    top1: float | None = None
    top5: float | None = None
    authors_top1: float | None = None
    authors_id: str = ""
    openmmlab_file: str = ""


PUBLISHED = {
    "hornet_tiny_7x7": Published(
        22_409_512, 3.976e9, 224, 1000, "hornet_tiny_7x7", 0.2, 100, 82.84, 96.24, 82.8,
        "1ca970586c6043709a3f", "hornet-tiny_3rdparty_in1k_20220915-0e8eedff.pth"),
    "hornet_tiny_gf": Published(
        22_991_848, 3.896e9, 224, 1000, "hornet_tiny_gf", 0.2, 1, 82.98, 96.38, 83.0,
        "511faad0bde94dfcaa54", "hornet-tiny-gf_3rdparty_in1k_20220915-4c35a66b.pth"),
    "hornet_small_7x7": Published(
        49_528_264, 8.826e9, 224, 1000, "hornet_small_7x7", 0.4, 5, 83.79, 96.75, 83.8,
        "46422799db2941f7b684", "hornet-small_3rdparty_in1k_20220915-5935f60f.pth"),
    "hornet_small_gf": Published(
        50_401_768, 8.706e9, 224, 1000, "hornet_small_gf", 0.4, 1, 83.98, 96.77, 84.0,
        "8405c984bf084d2ba85a", "hornet-small-gf_3rdparty_in1k_20220915-649ca492.pth"),
    "hornet_base_7x7": Published(
        87_256_680, 15.583e9, 224, 1000, "hornet_base_7x7", 0.5, 5, 84.24, 96.94, 84.2,
        "5c86cb3d655d4c17a959", "hornet-base_3rdparty_in1k_20220915-a06176bb.pth"),
    "hornet_base_gf": Published(
        88_421_352, 15.423e9, 224, 1000, "hornet_base_gf", 0.5, 1, 84.32, 96.95, 84.3,
        "6c84935e63b547f383fb", "hornet-base-gf_3rdparty_in1k_20220915-82c06fa7.pth"),
    "hornet_base_gf_img384": Published(92_099_560, None, 384, 1000, ""),
    "hornet_large_7x7": Published(
        194_542_504, 34.8e9, 224, 10459, "hornet_large_7x7_in22k", 0.2, 5, authors_id="a76f7ce114ad4e9c8ffb"),
    "hornet_large_gf": Published(
        196_289_512, 34.7e9, 224, 10459, "hornet_large_gf_in22k", 0.2, 1, authors_id="12c99a79e77341e59681"),
    "hornet_large_gf_img384": Published(
        201_806_824, 101.8e9, 384, 10459, "", authors_id="9253bd0d50c84ab1b71e"),
}


def published_files(name: str) -> list[PublishedFile]:
    """The files of `name`, the one with a published hash first; [] for none."""
    entry = PUBLISHED.get(name)
    files = []
    if entry and entry.openmmlab_file:
        prefix = entry.openmmlab_file.removesuffix(".pth")[-8:]
        files.append(PublishedFile("openmmlab", entry.openmmlab_file, OPENMMLAB_URL.format(entry.openmmlab_file),
                                   prefix))
    if entry and entry.authors_id:
        file_name = name + ("_22k.pth" if entry.classes == 10459 else ".pth")
        files.append(PublishedFile("authors", file_name, AUTHORS_URL.format(entry.authors_id)))
    return files


def synsets(classes: int) -> tuple[str, ...] | None:
    """WordNet synsets in the order of the published heads with 1000 or 10,459 rows; None for other heads."""
    return {1000: imagenet_synsets, 10459: published_22k_synsets}.get(classes, lambda: None)()


def default_classes(classes: int) -> list[str]:
    """Names for the classes of a head where its file has none: the published head's synsets, else numbers."""
    return list(synsets(classes) or map(str, range(classes)))
