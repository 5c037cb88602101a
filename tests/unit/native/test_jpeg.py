"""The compiled decoder gives Pillow's pixels bit for bit, leaves to Pillow what is damaged or rare, and is
not needed.
"""
import io
import random
import struct
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import native
from config.options import Options
from datasets.dataset import ImageDataset
from datasets.index import IndexCache, Source
from datasets.readers import open_reader
from datasets.transforms import Erasing, eval_transform, train_transform
from native import decoder as fast

if not fast.available():
    pytest.skip("needs a C++ compiler, jpeglib.h and Pillow's libjpeg", allow_module_level=True)

MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def jpeg(width, height, seed=0, mode="RGB", **save) -> bytes:
    """A image with smooth and noisy parts, so that every step of decoding shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    noisy = np.clip(smooth + rng.integers(-30, 31, smooth.shape) * (np.arange(width)[None, :, None] % 64 > 32), 0, 255)
    file = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).convert(mode).save(file, "JPEG", **{"quality": 90, **save})
    return file.getvalue()


def plain(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def same(ours, theirs) -> bool:
    assert isinstance(ours, fast.LazyImage)
    return ours.size == theirs.size and np.array_equal(np.asarray(ours), np.asarray(theirs))


@MANY
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 9), sampling=st.integers(0, 2),
       progressive=st.booleans(), mode=st.sampled_from(["RGB", "L"]), quality=st.sampled_from([30, 90, 100]),
       corner=st.tuples(*[st.floats(0, 1)] * 4), size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
       view=st.tuples(*[st.floats(0, 1)] * 4), bicubic=st.booleans())
@example(300, 700, 1, 2, False, "RGB", 90, (0., 0., 1., 1.), (64, 64), (0., 0., 1., 1.), True)
@example(33, 17, 1, 2, False, "RGB", 90, (.5, .5, .0, .0), (7, 9), (0., 0., 1., 1.), True)
def test_any_window_of_any_jpeg_is_pillows(width, height, seed, sampling, progressive, mode, quality, corner, size,
                                           view, bicubic):
    data = jpeg(width, height, seed, mode, subsampling=sampling, progressive=progressive, quality=quality,
                restart_marker_blocks=3 * (seed % 2))

    def box(part, whole):
        left, top = int(part[0] * (whole[0] - 1)), int(part[1] * (whole[1] - 1))
        return left, top, left + 1 + int(part[2] * (whole[0] - left - 1)), top + 1 + int(part[3] * (whole[1] - top - 1))

    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    crop, window = box(corner, (width, height)), box(view, size)

    def steps(image):
        return image.crop(crop).resize(size, resample).crop(window)

    assert fast.image_of(data) is not None
    assert same(steps(fast.image_of(data)), steps(plain(data)))
    assert same(fast.image_of(data).crop(crop), plain(data).crop(crop))


@MANY
@given(matrix=st.tuples(*[st.floats(-1.5, 1.5)] * 2, st.floats(-80, 80), *[st.floats(-1.5, 1.5)] * 2,
                        st.floats(-80, 80)), size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
       bicubic=st.booleans())
@example((1, .3, 0, 0, 1, 0), (64, 40), True)
@example((1, 0, 0, -.3, 1, 0), (40, 64), True)
@example((1, 0, -11.5, 0, 1, 0), (64, 64), True)
@example((1, 0, 0, 0, 1, 0.25), (3, 2), True)
def test_any_affine_warp_is_pillows(matrix, size, bicubic):
    data = jpeg(*size)
    arguments = dict(resample=Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR,
                     fillcolor=(124, 116, 104))
    assert same(fast.image_of(data).transform(size, Image.Transform.AFFINE, matrix, **arguments),
                plain(data).transform(size, Image.Transform.AFFINE, matrix, **arguments))


@pytest.fixture
def folder(tmp_path):
    """Images of every kind; the plain loader can read all but the last few."""
    root = tmp_path / "images" / "class"
    root.mkdir(parents=True)
    draw, good, exif, png = random.Random(0), jpeg(120, 90), Image.Exif(), io.BytesIO()
    plain(good).save(png, "PNG")
    exif[0x0112], exif[0x011A] = 6, 72.0
    middle, segment = len(good) // 2, b"Photoshop 3.0\x008BIM\x03\xed"
    files = {f"{i:02d}": jpeg(draw.randint(20, 400), draw.randint(20, 400), i, subsampling=i % 3,
                              progressive=i % 4 == 0) for i in range(12)}
    files |= {
        "gray": jpeg(90, 140, mode="L"),
        "cmyk": jpeg(90, 140, mode="CMYK"),
        "exif": jpeg(90, 140, exif=exif.tobytes()),
        "icc": jpeg(90, 140, icc_profile=b"profile" * 9),
        "comment": jpeg(90, 140, comment=b"\xff\xd8 words"),
        "png": png.getvalue(),
        "narrow": jpeg(3, 380),
        "trailing": good + b"behind the end",
        "damaged": good[:middle] + bytes(40) + good[middle + 40:],
        "marker": good[:middle] + b"\xff\xd9" + good[middle:],
        "unknown_marker": good[:-300] + b"\xff\xc8" + good[-298:],
        "table": good[:-300] + b"\xff\xc4\x00\x03\x77" + good[-295:],
        "photoshop": good[:2] + b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment + good[2:],
        "two_layers": good.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "no_end": good[:-2],
        "half": good[:middle],
        "tail_zero": good[:middle] + bytes(len(good) - middle),
        "header": good[:100],
        "empty": b"",
    }
    for name, content in files.items():
        (root / f"{name}.JPEG").write_bytes(content)
    return root.parent


class PillowAlone(ImageDataset):
    """As on a machine without the compiled decoder."""

    def __getitems__(self, items):
        with mock.patch("native.jpeg", return_value=None):
            return super().__getitems__(items)


def both(folder, transform, **arguments):
    reader = open_reader(Source.of(str(folder)), IndexCache(str(folder.parent / "cache")))
    return (kind(reader, reader.labels, transform, 64, **arguments) for kind in (ImageDataset, PillowAlone))


def test_training_batches_are_equal_with_and_without(folder):
    ours, theirs = both(folder, train_transform(Options(input_size=64)), seed=3, erasing=Erasing(0.5, 2))
    for epoch in range(4):
        items = [(epoch, index, index) for index in range(len(ours))]
        for name, a, b in zip(("images", "targets", "indices", "positions", "boxes"),
                              ours.__getitems__(items), theirs.__getitems__(items), strict=False):
            assert np.array_equal(a.numpy(), b.numpy()), name


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_batches_are_equal_and_the_same_files_are_bad(folder, interpolation):
    ours, theirs = both(folder, eval_transform(64, 0.875, interpolation))
    a, b = (dataset.__getitems__(list(range(len(dataset)))) for dataset in (ours, theirs))
    assert np.array_equal(a.images.numpy(), b.images.numpy()) and a.unreadable == b.unreadable
    bad = {ours.path(index).rsplit("/", 1)[1] for index, _ in a.unreadable}
    assert bad >= {"no_end.JPEG", "half.JPEG", "tail_zero.JPEG", "header.JPEG", "empty.JPEG"}
    assert not bad & {"cmyk.JPEG", "png.JPEG", "damaged.JPEG", "trailing.JPEG", "narrow.JPEG"}


def test_switched_off_everything_goes_through_pillow(monkeypatch):
    monkeypatch.setenv("HORNET_NATIVE", "0")
    fast.available.cache_clear()
    try:
        assert native.jpeg() is None
    finally:
        fast.available.cache_clear()


@pytest.mark.parametrize("spoilt,found", [("window", "decoding and resizing"), ("affine", "warps")])
def test_the_self_test_notices_another_pixel(monkeypatch, caplog, spoilt, found):
    library = fast._library()

    def wrong(*arguments):
        result = getattr(library, spoilt)(*arguments)
        fast.ctypes.c_uint8.from_address(arguments[-1]).value ^= 1
        return result

    functions = {name: getattr(library, name) for name in ("probe", "window", "affine", "pack")}
    monkeypatch.setattr(fast, "_library", lambda: SimpleNamespace(**functions | {spoilt: wrong}))
    fast.available.cache_clear()
    try:
        with caplog.at_level("WARNING", "hornet"):
            assert not fast.available() and found in caplog.text
    finally:
        fast.available.cache_clear()
