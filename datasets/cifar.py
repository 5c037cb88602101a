"""The form of CIFAR-10 and CIFAR-100 as distributed (python version), read without executing their
pickles."""
import hashlib
import importlib
import io
import os
import pickle
from collections.abc import Callable

import numpy as np

from common.errors import UserError
from datasets.images import read_file, readable
from datasets.readers import Reader

_FILES = {  # classes: folder, train files, val files, names file, key of the names, key of the labels
    10: ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta",
         "label_names", "labels"),
    100: ("cifar-100-python", ["train"], ["test"], "meta", "fine_label_names", "fine_labels")}
_ALLOWED = {  # what pickles of arrays, numbers and bytes are made of; none of it does anything else
    "numpy.core.multiarray": ("_reconstruct", "scalar"), "numpy.core.numeric": ("_frombuffer",),
    "numpy": ("ndarray", "dtype"), "_codecs": ("encode",), "builtins": ("bytes", "bytearray")}


class Cifar(Reader):
    """Images held in memory, uint8 (N, 32, 32, 3), in the order of the files."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: list[str], root: str):
        self.pixels, self.labels, self.classes, self.root = pixels, labels.astype(np.int32), classes, root
        self.left_out, self.form = {}, "CIFAR's arrays"
        self.order = hashlib.blake2b(self.labels.tobytes(), digest_size=16).hexdigest()

    def name(self, index: int) -> str:
        """File and position of image `index`."""
        return f"{self.root}[{index}]"

    def encoded(self, index: int) -> bytes:
        """Image `index` as a PPM file, which is its pixels behind a short header."""
        return b"P6 32 32 255\n" + self.pixels[index].tobytes()


def read_cifar(root: str, num_classes: int, train: bool) -> Cifar:
    """CIFAR-10 or -100 from `root`, or from its usual subfolder; UserError when a file is not what it should
    be."""
    if num_classes not in _FILES:
        raise UserError(f"CIFAR has 10 or 100 classes, not --nb_classes {num_classes}.", "unexpected_classes")
    subfolder, train_files, val_files, meta, names_key, labels_key = _FILES[num_classes]
    folder = os.path.join(root, subfolder) if os.path.isdir(os.path.join(root, subfolder)) else root
    pixels, labels, classes = [], [], []
    for name in (*(train_files if train else val_files), meta):
        path = os.path.join(folder, name)
        with readable(path, f"a file of the python version of CIFAR-{num_classes}"):
            content = read_arrays(path)
            if name == meta:
                classes = [text.decode() if isinstance(text, bytes) else text for text in content[names_key]]
                if len(set(classes)) != num_classes:
                    raise ValueError(f"it does not name {num_classes} classes")
            else:
                data, found = content["data"], np.asarray(content[labels_key], dtype=np.int32)
                known = len(found) == len(data) and set(found) <= set(range(num_classes))
                if data.dtype != np.uint8 or not known:
                    raise ValueError("its labels or pixels are out of range")
                pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(found)
    return Cifar(np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels), classes,
                 os.path.join(folder, "train" if train else "test"))


def read_arrays(path: str) -> dict:
    """The dictionary in a CIFAR file, pickled by Python 2 or 3, keys as text."""
    content = _ArraysOnly(io.BytesIO(read_file(path)), encoding="bytes").load()
    return {(name.decode() if isinstance(name, bytes) else name): value for name, value in content.items()}


class _ArraysOnly(pickle.Unpickler):
    """Accepts NumPy arrays and numbers beside plain containers and refuses every other global."""

    def find_class(self, module: str, name: str) -> Callable:
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)
