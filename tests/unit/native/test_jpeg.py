"""The compiled decoder gives Pillow's pixels bit for bit, leaves to Pillow what is damaged or rare, and is
not needed.
"""
import io
import random
import shutil
import struct
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_ops

import native
from common.log import logger
from common.random import seeded
from config.options import Options
from datasets.dataset import ImageDataset
from datasets.folders import read
from datasets.readers import IndexCache
from datasets.transforms import Erasing, eval_transform, train_transform
from native import decoder as fast

if not fast.available():
    pytest.skip("needs a C++ compiler, jpeglib.h and Pillow's libjpeg", allow_module_level=True)

MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def options(size=64, **changes):
    return Options(input_size=size, **changes)


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


@pytest.mark.parametrize("name", sorted(NAME_TO_OP))
def test_each_operation_of_randaugment_after_a_crop_and_between_others(name):
    data = jpeg(211, 160)
    settings_of_all = dict(magnitude_std=0.5, img_mean=(124, 116, 104), translate_const=30)
    first, between, last = (rand_augment_ops(9, 1.0, settings_of_all, [op])[0] for op in (name, "ShearX", "Color"))

    def steps(image):
        with seeded(sum(name.encode())):
            image = image.crop((13, 9, 180, 131)).resize((64, 64), Image.Resampling.BICUBIC)
            return [first(image), first(last(image)), last(between(first(between(image))))]

    for ours, theirs in zip(steps(fast.image_of(data)), steps(plain(data)), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture
def folder(tmp_path):
    """Images of every kind; the plain loader can read all but the last few."""
    root = tmp_path / "images" / "class"
    root.mkdir(parents=True)
    draw = random.Random(0)
    good = jpeg(120, 90)
    files = {f"{i:02d}.JPEG": jpeg(draw.randint(20, 400), draw.randint(20, 400), i, subsampling=i % 3,
                                   progressive=i % 4 == 0) for i in range(12)}
    files["gray.JPEG"] = jpeg(90, 140, mode="L")
    files["cmyk.JPEG"] = jpeg(90, 140, mode="CMYK")
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    files["exif.JPEG"] = jpeg(90, 140, exif=exif.tobytes())
    files["icc.JPEG"] = jpeg(90, 140, icc_profile=b"profile" * 9)
    files["comment.JPEG"] = jpeg(90, 140, comment=b"\xff\xd8 words")
    png = io.BytesIO()
    plain(good).save(png, "PNG")
    files["png.JPEG"] = png.getvalue()
    files["narrow.JPEG"] = jpeg(3, 380)
    files["trailing.JPEG"] = good + b"behind the end"
    middle = len(good) // 2
    files["damaged.JPEG"] = good[:middle] + bytes(40) + good[middle + 40:]
    files["marker.JPEG"] = good[:middle] + b"\xff\xd9" + good[middle:]
    files["unknown_marker.JPEG"] = good[:-300] + b"\xff\xc8" + good[-298:]
    files["table.JPEG"] = good[:-300] + b"\xff\xc4\x00\x03\x77" + good[-295:]
    files["no_end.JPEG"] = good[:-2]
    files["half.JPEG"] = good[:middle]
    files["tail_zero.JPEG"] = good[:middle] + bytes(len(good) - middle)
    files["header.JPEG"] = good[:100]
    files["empty.JPEG"] = b""
    files["two_layers.JPEG"] = good.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    segment = b"Photoshop 3.0\x008BIM\x03\xed"
    files["photoshop.JPEG"] = good[:2] + b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment + good[2:]
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root.parent


class PillowAlone(ImageDataset):
    """As on a machine without the compiled decoder."""

    def __getitems__(self, items):
        with mock.patch("native.jpeg", return_value=None):
            return super().__getitems__(items)


def both(folder, transform, **arguments):
    reader = read(str(folder), IndexCache(str(folder.parent / "cache")))
    return (kind(reader, reader.labels, transform, 64, **arguments) for kind in (ImageDataset, PillowAlone))


def test_training_batches_are_equal_with_and_without(folder):
    ours, theirs = both(folder, train_transform(options()), seed=3, erasing=Erasing(0.5, 2))
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


def test_without_a_compiler_everything_goes_through_pillow(folder, monkeypatch, tmp_path):
    ours, _ = both(folder, eval_transform(64))
    expected = ours.__getitems__([0, 1, 2]).images.numpy()
    messages = []
    monkeypatch.setattr(logger, "info", lambda text, *values: messages.append(text % values))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for cached in (fast._library, fast.available):
        cached.cache_clear()
    try:
        assert native.jpeg() is None and "g++" in messages[0]
        ours, _ = both(folder, eval_transform(64))
        assert np.array_equal(ours.__getitems__([0, 1, 2]).images.numpy(), expected)
        monkeypatch.undo()
        monkeypatch.setenv("HORNET_NATIVE", "0")
        fast.available.cache_clear()
        assert not fast.available()
    finally:
        monkeypatch.undo()
        for cached in (fast._library, fast.available):
            cached.cache_clear()


def test_the_self_test_notices_another_pixel(monkeypatch):
    library = fast._library()

    class Wrong:
        def __init__(self, spoilt):
            self.spoilt = spoilt

        def __getattr__(self, name):
            function = getattr(library, name)
            if name != self.spoilt:
                return function

            def spoilt(*arguments):
                result = function(*arguments)
                fast.ctypes.c_uint8.from_address(arguments[-1]).value ^= 1
                return result
            return spoilt

    for name, found in (("window", "decoding and resizing"), ("affine", "warps")):
        monkeypatch.setattr(fast, "_library", lambda name=name: Wrong(name))
        assert fast._self_test() == found
