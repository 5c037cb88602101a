"""Images for tests: noise and texture, whole data folders, and files that are no images."""
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.kits.fill import parity_image


def noise(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """An RGB image of `size` (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **arguments) -> bytes:
    """The file of an image, `kind` as Pillow calls it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    """A JPEG of noise."""
    return encoded(noise(seed, size), "JPEG")


def bomb() -> bytes:
    """A PNG whose header claims 30000 x 30000 pixels."""
    data = encoded(noise(0), "PNG")
    header = b"IHDR" + struct.pack(">II", 30000, 30000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def fill_folder(folder: Path, count: int) -> None:
    """`count` JPEGs named 0.JPEG, 1.JPEG, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.JPEG").write_bytes(jpeg(number))


def write_images(folder: Path, train: int = 52, val: int = 14) -> Path:
    """train/ and val/ with textured PNGs of several sizes, some of them gray, in three classes; always the
    same bits."""
    for part, count, first in (("train", train, 0), ("val", val, 1000)):
        for index in range(count):
            path = folder / part / f"class{index % 3}" / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = parity_image(first + index, 34 + 5 * (index % 4), 30 + 7 * (index % 3))
            Image.fromarray(pixels).convert("L" if index % 7 == 3 else "RGB").save(path)
    return folder
