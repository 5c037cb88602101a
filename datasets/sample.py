"""The embedded sample data: scikit-learn's handwritten digits as small JPEGs in the ILSVRC2012 layout."""
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.log import logger

SIZE = 64


def ensure_sample(folder: str | os.PathLike, write: Callable[[Path], None] | None = None,
                  parts: Sequence[str] = ("train", "val"),
                  what: str = "1437 + 360 handwritten digits") -> None:
    """Let `write` (the digits) make sample data at `folder`, unless all its `parts` are there.

    The files go to a temporary folder beside it, which is then renamed: `folder` is whole or not there, and
    of several processes that come at the same time the first one's is kept. Raises UserError when `folder`
    holds something else.
    """
    folder = Path(folder)
    complete = lambda: all((folder / part).is_dir() for part in parts)
    if complete():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            (write or write_digits)(Path(temporary, "data"))
            os.rename(Path(temporary, "data"), folder)
        logger.info("wrote the sample data, %s, to %s", what, folder)
    except OSError as error:
        if not complete():
            raise UserError(f"The sample data cannot be written to {folder} ({error.strerror or error}); "
                            "name another --data_path.", code="unwritable_folder") from error


def write_digits(folder: Path) -> None:
    """Write train/digit_N/… and val/digit_N/…; every fifth digit is held back, so the split never changes."""
    from sklearn.datasets import load_digits  # takes a second to import
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) in 0..16
    for number, (values, label) in enumerate(zip(pixels.reshape(-1, 8, 8), labels, strict=True)):
        part = "val" if number % 5 == 0 else "train"
        target = folder / part / f"digit_{label}"
        target.mkdir(parents=True, exist_ok=True)
        gray = np.round(values * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(gray).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(target / f"{part}_{number:05d}.JPEG", quality=95)
