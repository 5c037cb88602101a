"""Decoding one image: what the published code accepts, and one exception for everything that cannot be read."""
import errno
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image

from common.text import printable as show  # noqa: F401  the name that the other modules still import

# Named formats keep Pillow's other plug-ins (EPS starts Ghostscript) out of reach of a data folder.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# The process ran out of something: not the image's fault, so it must not count as a bad image.
_PROCESS_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BadImage(Exception):
    """An image that cannot be read; the message is the reason without its path."""


def decode(file: BinaryIO) -> Image.Image:
    """The whole image as RGB: any mode through `convert('RGB')`, EXIF orientation ignored, as published.

    Raises BadImage for whatever Pillow says about the bytes, a decompression bomb (more than twice
    `Image.MAX_IMAGE_PIXELS`, 179 million pixels) included.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(file, formats=FORMATS).convert("RGB")
    except OSError as error:
        if error.errno in _PROCESS_ERRORS:
            raise
        raise BadImage(_reason(error)) from error
    except Exception as error:  # Damaged files make Pillow's plug-ins raise nearly anything.
        raise BadImage(_reason(error)) from error


def decode_path(path: str) -> Image.Image:
    """`decode` for a file; one that cannot be opened (missing, a loop of links, no permission) is a BadImage too."""
    with _opened(path) as file:
        return decode(file)


def read_path(path: str) -> bytes:
    """The bytes of a file; BadImage when it cannot be opened or read."""
    with _opened(path, buffering=0) as file:
        try:
            return file.read()
        except OSError as error:
            if error.errno in _PROCESS_ERRORS:
                raise
            raise BadImage(_reason(error)) from error


def _opened(path: str, buffering: int = -1) -> BinaryIO:
    try:
        return open(path, "rb", buffering)
    except OSError as error:
        if error.errno in _PROCESS_ERRORS:
            raise
        raise BadImage(_reason(error)) from error


def from_array(pixels: np.ndarray) -> Image.Image:
    """An RGB image from uint8 (height, width, 3)."""
    return Image.fromarray(pixels, "RGB") if pixels.ndim == 3 else Image.fromarray(pixels).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "no JPEG, PNG, BMP, PPM, TIFF, WebP or GIF image"
    return f"{type(error).__name__}: {text}"[:200]
