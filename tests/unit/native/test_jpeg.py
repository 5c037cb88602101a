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
from tests.kits.images import encoded
from tests.kits.runs import assert_equal_bits

if not fast.available():
    pytest.skip("needs a C++ compiler, jpeglib.h and Pillow's libjpeg", allow_module_level=True)

MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PART, SIZE = st.tuples(*[st.floats(0, 1)] * 4), st.tuples(st.integers(1, 90), st.integers(1, 90))
FILTER = st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])


def jpeg(width, height, seed=0, mode="RGB", **save) -> bytes:
    """An image with smooth and noisy parts, so that every step of decoding shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    noise = rng.integers(0, 32, (height, width, 3), dtype=np.uint8) * (np.arange(width)[:, None] % 64 > 32)
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) ^ noise
    return encoded(Image.fromarray(pixels).convert(mode), "JPEG", **{"quality": 90, **save})


def assert_same(data: bytes, *steps) -> None:
    """The decoder's image equals Pillow's after these steps, and is still the decoder's."""
    ours, theirs = fast.image_of(data), Image.open(io.BytesIO(data)).convert("RGB")
    for name, *arguments in steps:
        ours, theirs = getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments)
    assert isinstance(ours, fast.LazyImage) and ours.size == theirs.size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@MANY
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 9), sampling=st.integers(0, 2),
       progressive=st.booleans(), mode=st.sampled_from(["RGB", "L"]), quality=st.sampled_from([30, 90, 100]),
       corner=PART, size=SIZE, view=PART, resample=FILTER)
@example(300, 700, 1, 2, False, "RGB", 90, (0., 0., 1., 1.), (64, 64), (0., 0., 1., 1.), Image.Resampling.BICUBIC)
@example(33, 17, 1, 2, False, "RGB", 90, (.5, .5, .0, .0), (7, 9), (0., 0., 1., 1.), Image.Resampling.BICUBIC)
def test_any_window_of_any_jpeg_is_pillows(width, height, seed, sampling, progressive, mode, quality, corner, size,
                                           view, resample):
    data = jpeg(width, height, seed, mode, subsampling=sampling, progressive=progressive, quality=quality,
                restart_marker_blocks=3 * (seed % 2))

    def box(part, whole):
        left, top = int(part[0] * (whole[0] - 1)), int(part[1] * (whole[1] - 1))
        return left, top, left + 1 + int(part[2] * (whole[0] - left - 1)), top + 1 + int(part[3] * (whole[1] - top - 1))

    crop = "crop", box(corner, (width, height))
    assert_same(data, crop)
    assert_same(data, crop, ("resize", size, resample), ("crop", box(view, size)))


@MANY
@given(matrix=st.tuples(*[st.floats(-1.5, 1.5)] * 2, st.floats(-80, 80), *[st.floats(-1.5, 1.5)] * 2,
                        st.floats(-80, 80)), size=SIZE, resample=FILTER)
@example((1, .3, 0, 0, 1, 0), (64, 40), Image.Resampling.BICUBIC)
@example((1, 0, 0, -.3, 1, 0), (40, 64), Image.Resampling.BICUBIC)
@example((1, 0, -11.5, 0, 1, 0), (64, 64), Image.Resampling.BICUBIC)
@example((1, 0, 0, 0, 1, 0.25), (3, 2), Image.Resampling.BICUBIC)
def test_any_affine_warp_is_pillows(matrix, size, resample):
    assert_same(jpeg(*size), ("transform", size, Image.Transform.AFFINE, matrix, resample, 1, (124, 116, 104)))


@pytest.fixture
def folder(tmp_path):
    """Images of every kind; the plain loader can read all but the last few."""
    root = tmp_path / "images" / "class"
    root.mkdir(parents=True)
    draw, good, exif = random.Random(0), jpeg(120, 90), Image.Exif()
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
        "png": encoded(Image.open(io.BytesIO(good)), "PNG"),
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


@pytest.mark.parametrize("transform, erasing, epochs", [
    (train_transform(Options(input_size=64)), Erasing(0.5, 2), range(4)),
    (eval_transform(64, 0.875, "bicubic"), None, [None]), (eval_transform(64, 0.875, "bilinear"), None, [None])])
def test_batches_are_equal_with_and_without_and_the_same_files_are_bad(folder, transform, erasing, epochs):
    reader = open_reader(Source.of(str(folder)), IndexCache(str(folder.parent / "cache")))
    part, bad = ImageDataset(reader, reader.labels, transform, 64, seed=3, erasing=erasing), set()
    for epoch in epochs:
        items = [index if epoch is None else (epoch, index, index) for index in range(len(part))]
        ours = part.__getitems__(items)
        with mock.patch("native.jpeg", return_value=None):
            assert_equal_bits(ours._asdict(), part.__getitems__(items)._asdict())
        bad |= {part.path(index).rsplit("/", 1)[1] for index, _ in ours.unreadable}
    assert bad >= {"no_end.JPEG", "half.JPEG", "tail_zero.JPEG", "header.JPEG", "empty.JPEG"}
    assert not bad & {"cmyk.JPEG", "png.JPEG", "damaged.JPEG", "trailing.JPEG", "narrow.JPEG"}


def test_switched_off_everything_goes_through_pillow(monkeypatch):
    monkeypatch.setenv("HORNET_NATIVE", "0")
    monkeypatch.setattr(fast, "available", fast.available.__wrapped__)
    assert native.jpeg() is None


@pytest.mark.parametrize("spoilt, found", [("window", "decoding and resizing"), ("affine", "warps")])
def test_the_self_test_notices_another_pixel(monkeypatch, logged, spoilt, found):
    library = fast._library()

    def wrong(*arguments):
        result = getattr(library, spoilt)(*arguments)
        fast.ctypes.c_uint8.from_address(arguments[-1]).value ^= 1
        return result

    functions = {name: getattr(library, name) for name in ("probe", "window", "affine", "pack")}
    monkeypatch.setattr(fast, "_library", lambda: SimpleNamespace(**functions | {spoilt: wrong}))
    assert not fast.available.__wrapped__() and found in logged.text
