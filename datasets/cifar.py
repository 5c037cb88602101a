"""CIFAR-10 and CIFAR-100 as distributed (python version), read without executing their pickles."""
import io
import os
import pickle

import numpy as np

from common.errors import UserError
from datasets.images import show
from datasets.readers import ArrayReader

_FILES = {  # classes: folder, train files, test files, names file, key of the names, key of the labels
    10: ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta",
         "label_names", "labels"),
    100: ("cifar-100-python", ["train"], ["test"], "meta", "fine_label_names", "fine_labels")}


class _ArraysOnly(pickle.Unpickler):
    """Accepts NumPy arrays beside plain containers and refuses every other global."""

    def find_class(self, module: str, name: str):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _reconstruct(kind, shape, code):
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("only plain arrays are allowed")
    return np.ndarray.__new__(np.ndarray, shape, code)


def read_arrays(path: str) -> dict[str, object]:
    """The dictionary in a CIFAR file, keys as text; UserError when it holds anything but arrays and plain values."""
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(io.BytesIO(file.read()), encoding="bytes").load()
        return {(name.decode() if isinstance(name, bytes) else name): value for name, value in content.items()}
    except OSError as error:
        raise UserError(f"{show(path)} cannot be read ({error.strerror}); unpack the python version of CIFAR "
                        "there.") from error
    except Exception as error:  # A damaged or hostile pickle raises nearly anything; nothing of it has been executed.
        raise UserError(f"{show(path)} is not a CIFAR file ({error}); download the python version again.") from error


def read_cifar(root: str, num_classes: int, train: bool) -> ArrayReader:
    """CIFAR-10 or -100 from `root`, or from its usual subfolder."""
    if num_classes not in _FILES:
        raise UserError(f"--data_set CIFAR has 10 or 100 classes, not --nb_classes {num_classes}.")
    subfolder, train_files, test_files, meta, names_key, labels_key = _FILES[num_classes]
    folder = os.path.join(root, subfolder) if os.path.isdir(os.path.join(root, subfolder)) else root
    pixels, labels = [], []
    for name in train_files if train else test_files:
        content = read_arrays(os.path.join(folder, name))
        data, found = np.asarray(content.get("data")), np.asarray(content.get(labels_key))
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or found.shape != data.shape[:1] \
                or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= num_classes:
            raise UserError(f"{show(os.path.join(folder, name))} does not hold CIFAR-{num_classes} images and "
                            "labels; download the python version again.")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(found)
    classes = [name.decode() for name in read_arrays(os.path.join(folder, meta))[names_key]]
    return ArrayReader(np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels), classes,
                       os.path.join(folder, "train" if train else "test"))
