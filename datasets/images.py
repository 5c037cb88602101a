"""From the bytes of a file to an image: which formats, which pixels, and one exception for all that cannot be
read.

Pixels are those of Pillow's `convert("RGB")`, as published: an animation's first frame, no EXIF orientation
unless it is asked for, and an alpha channel dropped without blending, so that the colours stored under
transparent parts show. Only 16-bit grey differs: its values are scaled by 1/257, where Pillow would cut them
off at 255 and show white.
"""
import errno
import gzip
import io
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import MAY_PASS, Failure, UserError
from common.text import file_size, printable

# Named formats keep Pillow's other plug-ins (EPS starts Ghostscript) out of reach of a data folder.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF")
LARGEST_FILE = 1 << 30  # bytes

# The process ran out of something: not the image's fault, so it must not count as a bad image.
_PROCESS_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
PATIENCE = 30.0  # seconds
_16_BITS = ("PNG", "PPM")  # what these give as mode I has 16 bits
_T = TypeVar("_T")


class BadImage(Exception):
    """An image that cannot be read; the message is the reason without its path."""


def unreadable(path: str, reason: str) -> str:
    """The sentence for an image that cannot be read; what follows from it stands in `datasets.dataset`."""
    return f"{printable(path)} cannot be read ({reason})"


@cache
def extensions() -> tuple[str, ...]:
    """Endings of file names, in lower case and with the dot, that Pillow gives to the formats read here."""
    known = Image.registered_extensions()  # loads all of Pillow's plug-ins
    return tuple(sorted(name for name, kind in known.items() if kind in (*FORMATS, "MPO")))


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden files, such as macOS' `._x.jpg`, are not."""
    return name.lower().endswith(extensions()) and not name.startswith(".")


def read_file(path: str, limit: int = LARGEST_FILE, there: str | None = None) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; BadImage for any other, which is not even
    opened. `there` is the folder whose absence is waited for as in `retried`."""
    def read() -> bytes:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size > limit:
            raise BadImage(f"larger than {file_size(limit)}")
        with open(path, "rb", buffering=0) as file:
            return file.read()

    with failures_are_the_images():
        return read() if there is None else retried(read, there)


def retried(read: Callable[[], _T], there: str) -> _T:
    """`read()`, repeated for PATIENCE seconds while a file system fails in a way that may pass, or while the
    path `there`, without which nothing can be read, is missing; then Failure when it is still missing.

    After a wait in vain, nothing waits again until something was read.
    """
    global _patience
    started = time.monotonic()
    while True:
        try:
            found = read()
            _patience = PATIENCE
            return found
        except OSError as error:
            lost = not os.path.exists(there)
            if error.errno not in MAY_PASS and not lost:
                raise
            if time.monotonic() - started >= _patience:
                _patience = 0.0
                if not lost:
                    raise
                raise Failure(f"{printable(there)} has gone ({error.strerror or error}); the same command "
                              "resumes when it is back.", code="data_lost") from error
        time.sleep(0.25)


_patience = PATIENCE


def decode(data: bytes, exif_orientation: bool = False) -> Image.Image:
    """The whole image as RGB, by Pillow; `exif_orientation` turns it as its EXIF entry says.

    Raises BadImage for whatever Pillow says about the bytes, a decompression bomb (more than twice
    `Image.MAX_IMAGE_PIXELS`, 179 million pixels) included, and for 32-bit pixels, whose range nobody knows.
    """
    with failures_are_the_images(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(unzipped(data)), formats=FORMATS)
        kind = image.format
        if exif_orientation:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and kind in _16_BITS):
            image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise BadImage("32-bit pixels, which have no common range; save it with 8 or 16 bits")
        return image.convert("RGB")


def unzipped(data: bytes, limit: int = 1 << 26) -> bytes:
    """The bytes inside of gzip, as some images of ImageNet-22k are stored; other bytes as they are."""
    if data[:2] != b"\x1f\x8b":
        return data
    with gzip.open(io.BytesIO(data)) as file:
        plain = file.read(limit + 1)
    if len(plain) > limit:
        raise BadImage(f"larger than {file_size(limit)}")
    return plain


@contextmanager
def failures_are_the_images() -> Iterator[None]:
    """BadImage for whatever reading or decoding raises, but for what the machine lacks and lost disks."""
    try:
        yield
    except (BadImage, Failure):
        raise
    except Exception as error:  # Damaged files make Pillow's plug-ins raise nearly anything.
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text}"[:200]
        if isinstance(error, UnidentifiedImageError):
            reason = "no JPEG, PNG, BMP, PPM, TIFF, WebP, GIF, JPEG 2000 or AVIF image"
        elif isinstance(error, OSError) and error.errno is not None:
            if error.errno in _PROCESS_ERRORS:
                raise
            reason = error.strerror
        raise BadImage(reason) from error


@contextmanager
def readable(path: str, kind: str, code: str = "unreadable_data") -> Iterator[None]:
    """UserError for what a damaged container or list raises while it is read."""
    try:
        yield
    except Exception as error:  # Damaged or hostile files make parsers raise nearly anything.
        # The file system's errors have a number, pyarrow's about contents have none.
        number = getattr(error, "errno", None)
        if isinstance(error, (UserError, MemoryError)) or number not in (None, errno.ENOENT):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{printable(path)} cannot be read as {kind} ({reason}); copy or make it again.",
                        code) from error


def transformed(data: bytes, transform: Callable[[Image.Image], _T], exif_orientation: bool = False) -> _T:
    """`transform(image)` of encoded `data`, through the compiled JPEG reader where it is available, else
    through Pillow; both give the same pixels. Raises BadImage.

    The compiled reader decodes only what a crop needs, so it finds damage within the transform, which is then
    called a second time, with Pillow's image: draws must be seeded inside it. Turned images are left to
    Pillow.
    """
    # EXIF or XMP may turn it.
    turned = exif_orientation and (b"Exif\0" in data or b"Orientation" in data)
    fast = None if turned else fast_jpeg()
    image = fast.image_of(data) if fast else None
    if fast and image is not None:
        try:
            return transform(image)
        except fast.NeedsPillow:
            pass
    return transform(decode(data, exif_orientation))


def fast_jpeg() -> ModuleType | None:
    """The compiled JPEG reader, None where it is not available."""
    import native
    return native.jpeg()
