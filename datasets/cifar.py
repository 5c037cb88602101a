"""The form of CIFAR-10 and CIFAR-100 as distributed (python version), read without executing their pickles."""
import io
import os
import pickle
from collections.abc import Callable

import numpy as np

from common.errors import UserError
from common.text import printable
from datasets.images import BadImage, read_file

_FILES = {  # classes: folder, train files, val files, names file, key of the names, key of the labels
    10: ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta",
         "label_names", "labels"),
    100: ("cifar-100-python", ["train"], ["test"], "meta", "fine_label_names", "fine_labels")}
_AGAIN = "unpack the python version of CIFAR there"


class Cifar:
    """Images held in memory, uint8 (N, 32, 32, 3); a Reader."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: list[str], root: str):
        self.pixels, self.labels, self.classes, self.root = pixels, labels.astype(np.int32), classes, root
        self.left_out: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """File and position of image `index`."""
        return f"{self.root}[{index}]"

    def encoded(self, index: int) -> bytes:
        """Image `index` as a PPM file, which is its pixels behind a short header."""
        return b"P6 32 32 255\n" + self.pixels[index].tobytes()


def read_cifar(root: str, num_classes: int, train: bool) -> Cifar:
    """CIFAR-10 or -100 from `root`, or from its usual subfolder."""
    if num_classes not in _FILES:
        raise UserError(f"--data_set CIFAR has 10 or 100 classes, not --nb_classes {num_classes}.", code="wrong_classes")
    subfolder, train_files, val_files, meta, names_key, labels_key = _FILES[num_classes]
    folder = os.path.join(root, subfolder) if os.path.isdir(os.path.join(root, subfolder)) else root
    pixels, labels = [], []
    for name in train_files if train else val_files:
        path = os.path.join(folder, name)
        content = read_arrays(path)
        data, found = content.get("data"), np.asarray(content.get(labels_key))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 \
                or found.shape != data.shape[:1] or not len(found) or found.dtype.kind not in "iu" \
                or found.min() < 0 or found.max() >= num_classes:
            raise _refused(path, f"it does not hold images and labels of CIFAR-{num_classes}")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(found)
    path = os.path.join(folder, meta)
    listed = read_arrays(path).get(names_key)
    classes = [name.decode() if isinstance(name, bytes) else str(name)
               for name in (listed if isinstance(listed, list) else [])]
    if len(set(classes)) != num_classes:
        raise _refused(path, f"it does not name {num_classes} classes")
    return Cifar(np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels), classes,
                 os.path.join(folder, "train" if train else "test"))


def read_arrays(path: str) -> dict[str, object]:
    """The dictionary in a CIFAR file, pickled by Python 2 or 3, keys as text; UserError when it holds anything but
    arrays and plain values."""
    try:
        content = _ArraysOnly(io.BytesIO(read_file(path)), encoding="bytes").load()
        return {(name.decode() if isinstance(name, bytes) else name): value for name, value in content.items()}
    except BadImage as error:
        raise UserError(f"{printable(path)} cannot be read ({error}); {_AGAIN}.", code="missing_data") from error
    except Exception as error:  # A damaged or hostile pickle raises nearly anything; nothing of it has been executed.
        raise _refused(path, str(error)) from error


def _refused(path: str, reason: str) -> UserError:
    return UserError(f"{printable(path)} is not a CIFAR file ({reason}); {_AGAIN}.", code="unreadable_data")


class _ArraysOnly(pickle.Unpickler):
    """Accepts NumPy arrays and numbers beside plain containers and refuses every other global."""

    def find_class(self, module: str, name: str) -> Callable:
        kind = (module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name)
        if kind not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _ALLOWED[kind]


def _array(kind: type, shape: tuple[int, ...], code: object) -> np.ndarray:
    if kind is not np.ndarray or np.prod(shape) != 0:  # NumPy makes them empty and fills them by their state
        raise pickle.UnpicklingError("only plain arrays are allowed")
    return np.ndarray(shape, np.int8)


def _array_of_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _number(dtype: np.dtype, content: bytes) -> object:
    return np.frombuffer(content, dtype=dtype)[0]  # refuses objects


def _bytes_of_text(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the encoding {encoding} is not allowed")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy.core.multiarray", "_reconstruct"): _array, ("numpy.core.multiarray", "scalar"): _number,
    ("numpy.core.numeric", "_frombuffer"): _array_of_buffer, ("_codecs", "encode"): _bytes_of_text,
    ("builtins", "bytes"): bytes, ("builtins", "bytearray"): bytearray,
    ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
