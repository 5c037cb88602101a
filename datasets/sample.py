"""The embedded sample data: scikit-learn's handwritten digits as small JPEGs in the ILSVRC2012 layout."""
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.log import logger

CLASSES = 10
TRAIN_IMAGES, VAL_IMAGES = 1437, 360
SIZE = 64


def ensure_sample(folder: str | os.PathLike) -> None:
    """Write the sample data to `folder` unless it is there; processes that come at the same time wait for the first.

    The files go to a temporary folder beside it, which is then renamed: `folder` is whole or not there.
    Raises UserError when `folder` holds something else.
    """
    given, folder = folder, Path(folder).absolute()
    if _complete(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _complete(folder):
                _write(folder)
                logger.info("wrote the sample data, %d + %d handwritten digits, to %s", TRAIN_IMAGES, VAL_IMAGES, given)
    except OSError as error:
        raise UserError(f"The sample data cannot be written to {folder} ({error.strerror or error}); "
                        "name a folder you may write to with --data_path.") from error


def _complete(folder: Path) -> bool:
    return (folder / "train").is_dir() and (folder / "val").is_dir()


def _write(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--data_path {folder} holds other files and not the sample data; name a new folder.")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_digits(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_digits(folder: Path) -> None:
    """Write train/digit_N/… and val/digit_N/…; every fifth digit is held back, so the split never changes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The sample data comes from scikit-learn, which is not installed; "
                        "run `pip install -r requirements.txt`.") from error
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "val" if number % 5 == 0 else "train"
        target = folder / part / f"digit_{label}"
        target.mkdir(parents=True, exist_ok=True)
        gray = np.round(pixels * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(gray).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(target / f"{part}_{number:05d}.JPEG", quality=95)
