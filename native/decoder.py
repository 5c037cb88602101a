"""JPEGs through `decoder.cpp`: images that note crop and resize until pixels are wanted, and decode those.

`image_of(data)` gives an image that timm's and torchvision's transforms take like any other; what it does
not do itself is Pillow's. The pixels are Pillow's own bit for bit, which a self-test makes sure of in each
process; where it fails, or the library cannot be built, `available()` is False and Pillow does everything.
"""
import ctypes
import io
import os
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.log import logger
from native.build import load_compiled, switched_off

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
          "-ldl")
_GAIN = "made loading 1.5 to 2.7 times as fast where it was measured"  # native/README.md
_LARGEST = 64_000_000  # pixels; Pillow decides about larger ones (its limit against decompression bombs)
_FILTERS: dict[Any, int] = {Image.Resampling.BILINEAR: 0, Image.Resampling.BICUBIC: 1}


class NeedsPillow(Exception):
    """The file is damaged or of a rare form: decode it with Pillow, whose verdict counts."""


@cache
def available() -> bool:
    """Whether the decoder works here and agrees with Pillow; one line in the log where it does not."""
    if switched_off() or _library() is None:
        return False
    differing = _self_test()
    if differing:
        logger.warning("JPEG decoder: it differs from Pillow in %s, so Pillow is used.", differing)
    return not differing


@cache
def _library() -> Any:
    """The compiled functions, or None."""
    path = _libjpeg_of_pillow()
    if path is None or sys.byteorder != "little":
        return None
    version = "80" if ".so.8" in path else "62"
    flags = (f"-DJPEG_LIB_VERSION={version}", *_FLAGS)
    library = load_compiled(Path(__file__).with_name("decoder.cpp"), flags, "JPEG decoder", _GAIN)
    if library is None or library.use_libjpeg(os.fsencode(path)):
        return None
    library.affine.restype = library.pack.restype = None
    library.probe.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
    library.window.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    library.affine.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
                               ctypes.c_uint32, ctypes.c_void_p]
    library.pack.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return library


def _libjpeg_of_pillow() -> str | None:
    """The libjpeg that Pillow has loaded: the one in its own folder of libraries, or the system's."""
    Image.core.jpeg_decoder  # noqa: B018  (raises where Pillow was built without JPEG)
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(maxsplit=5)[5] for line in lines if "/libjpeg" in line and ".so" in line}
    own = [path for path in found if "illow" in Path(path).parent.name]
    return next(iter(own or sorted(path for path in found if ".libs/" not in path)), None)


def image_of(data: bytes) -> Image.Image | None:
    """An image of a JPEG's bytes, whose pixels are decoded when wanted; None for what Pillow shall open.

    Transforming it, or asking for its pixels, raises NeedsPillow when the bytes turn out to be damaged.
    """
    size = (ctypes.c_int * 2)()
    verdict = _library().probe(data, len(data), size)
    if verdict == 2 or size[0] * size[1] > _LARGEST:
        return None
    if verdict == 1:  # Pillow reads EXIF and other segments when it opens a file, and may refuse it for one.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opened = Image.open(io.BytesIO(data), formats=("JPEG",))
        except Exception:  # Whatever it is, the plain path meets it again and names it.
            return None
        if opened.format != "JPEG" or opened.size != tuple(size):
            return None
    return LazyImage(tuple(size), _Pending(data, (0, 0, *size)))


@dataclass(frozen=True)
class _Pending:
    """Bytes of a JPEG, a rectangle of it and, once resized, the new size, a rectangle of that, the filter.

    Rectangles are (left, top, width, height).
    """

    data: bytes
    crop: tuple[int, int, int, int]
    resized: tuple[int, int] | None = None
    view: tuple[int, int, int, int] | None = None
    bicubic: int = 1

    def cropped(self, left: int, top: int, width: int, height: int) -> "_Pending":
        """Only the rectangle `left`, `top`, `width`, `height` of it."""
        x, y, _, _ = self.view or self.crop
        part = x + left, y + top, width, height
        return replace(self, crop=part) if self.view is None else replace(self, view=part)

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 4): red, green, blue and an unused byte."""
        resized = self.resized or self.crop[2:]
        view = self.view or (0, 0, *resized)
        out = np.empty((view[3], view[2], 4), dtype=np.uint8)
        numbers = (ctypes.c_int * 11)(*self.crop, *resized, *view, self.bicubic)
        if _library().window(self.data, len(self.data), numbers, out.ctypes.data):
            raise NeedsPillow
        return out


class LazyImage(Image.Image):
    """An RGB image in one of three states: bytes still to be decoded, an array of pixels, Pillow's own."""

    def __init__(self, size: tuple[int, int], pending: _Pending | None = None,
                 pixels: np.ndarray | None = None):
        super().__init__()
        self._mode, self._size, self._pending, self._array = "RGB", size, pending, pixels

    @property
    def im(self):
        """Pillow's storage, filled now if it was not; every method of Pillow begins here."""
        if self._im is None:
            self._im = Image.frombytes("RGB", self.size, self.pixels(), "raw", "RGBX").im
        return self._im

    @im.setter
    def im(self, im) -> None:
        self._im = im

    def load(self):
        """Fill Pillow's storage."""
        return self.im.pixel_access(self.readonly)

    def _new(self, im) -> Image.Image:
        if im.mode != "RGB":
            return super()._new(im)
        new = LazyImage(im.size)
        new.im = im
        return new

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 4), the fourth byte unused."""
        if self._array is None:
            if self._pending is not None:
                self._array, self._pending = self._pending.pixels(), None
            else:
                data = Image.Image.tobytes(self, "raw", "RGBX")
                self._array = np.frombuffer(data, dtype=np.uint8).reshape(self.height, self.width, 4)
        return self._array

    @property
    def __array_interface__(self) -> dict:
        pixels = self.pixels()
        out = np.empty((self.height, self.width, 3), dtype=np.uint8)
        _library().pack(pixels.ctypes.data, self.width * self.height, out.ctypes.data)
        return out.__array_interface__ | {"data": out.data}

    def crop(self, box=None) -> Image.Image:
        """As Pillow's; only noted while nothing is decoded and the box lies inside."""
        if self._pending is None or box is None or any(value != int(value) for value in box):
            return super().crop(box)
        left, top, right, bottom = map(int, box)
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            return super().crop(box)
        size = right - left, bottom - top
        return LazyImage(size, self._pending.cropped(left, top, *size))

    def resize(self, size, resample=None, box=None, reducing_gap=None) -> Image.Image:
        """As Pillow's; only noted before the first resize."""
        pending, (width, height) = self._pending, map(int, size)
        narrow = self.height > 100 * self.width  # which Pillow resizes in another order
        if pending is None or pending.resized or box or reducing_gap or narrow or resample not in _FILTERS \
                or min(width, height) < 1:
            return super().resize(size, resample, box, reducing_gap)
        view = 0, 0, width, height
        resized = replace(pending, resized=(width, height), view=view, bicubic=_FILTERS[resample])
        return LazyImage((width, height), resized)

    def transpose(self, method) -> Image.Image:
        """As Pillow's; the horizontal flip by NumPy."""
        if method != Image.Transpose.FLIP_LEFT_RIGHT or self._im is not None:
            return super().transpose(method)
        flipped = np.ascontiguousarray(self.pixels().view(np.uint32)[:, ::-1])
        return LazyImage(self.size, pixels=flipped.view(np.uint8))

    def transform(self, size, method, data=None, resample=Image.Resampling.NEAREST, fill=1, fillcolor=None):
        """As Pillow's; affine warps within the same size are compiled."""
        rare = method != Image.Transform.AFFINE or tuple(size) != self.size or resample not in _FILTERS
        if rare or not isinstance(fillcolor, tuple) or len(fillcolor) != 3 or data is None or len(data) != 6:
            return super().transform(size, method, data, resample, fill, fillcolor)
        pixels = self.pixels()
        out = np.empty_like(pixels)
        fill_bytes = bytes(map(int, fillcolor))
        _library().affine(pixels.ctypes.data, self.width, self.height, (ctypes.c_double * 6)(*data),
                          _FILTERS[resample], int.from_bytes(fill_bytes, "little"), out.ctypes.data)
        return LazyImage(self.size, pixels=out)


def _self_test() -> str:
    """What differs from Pillow, '' when nothing does: images of each form through crop, resize and warps."""
    rng = np.random.default_rng(0)
    for number, (width, height, sampling, kind) in enumerate((
            (97, 61, 0, {}), (131, 90, 1, {}), (150, 113, 2, {}), (83, 210, 2, {"progressive": True}),
            (64, 64, 2, {}))):
        noise = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        mode = "L" if number == 4 else "RGB"
        image.convert(mode).save(file, "JPEG", quality=90, subsampling=sampling, **kind)
        plain, lazy = Image.open(io.BytesIO(file.getvalue())).convert("RGB"), image_of(file.getvalue())
        cut = image_of(file.getvalue()[:-60])
        if lazy is None or cut is None:
            return "reading headers"
        left, top = width // 3, height // 4
        for box in ((0, 0, width, height), (left, top, left + 2 * width // 5, top + height // 2)):
            for resample in _FILTERS:
                try:
                    ours = lazy.crop(box).resize((48, 40), resample)
                    theirs = plain.crop(box).resize((48, 40), resample)
                    if (np.asarray(ours) != np.asarray(theirs)).any():
                        return "decoding and resizing"
                    ours, theirs = _warped(ours, resample), _warped(theirs, resample)
                    if any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(ours, theirs, strict=True)):
                        return "warps"
                except NeedsPillow:
                    return "what it can decode"
        try:
            np.asarray(cut.crop((0, 0, 9, 9)))
            return "noticing a cut file"
        except NeedsPillow:
            continue
    return ""


def _warped(image: Image.Image, resample: int) -> list[Image.Image]:
    matrices = ((1, 0.2, 0, 0, 1, 0), (1, 0, 0, -0.3, 1, 0), (1, 0, 7.3, 0, 1, 0), (1, 0, 0, 0, 1, -5.6))
    arguments: dict[str, Any] = dict(resample=resample, fillcolor=(124, 116, 104))
    turned = [image.rotate(angle, **arguments) for angle in (17.3, -28.0)]
    return turned + [image.transform(image.size, Image.Transform.AFFINE, matrix, **arguments)
                     for matrix in matrices] + [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
