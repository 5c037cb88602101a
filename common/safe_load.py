"""Reading checkpoints from anywhere without running anything in them.

A `.pth` file is a pickle: an ordinary `torch.load` would run whatever program its author put there.
`weights_only=True` rebuilds tensors and plain containers only. What older training files hold besides
(the `args` namespace, NumPy scalars) is rebuilt here by classes of our own that can only hold values, so
that neither argparse nor NumPy takes part. torch does not notice flipped bits, hence the CRC check.
"""
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from common.errors import UserError, kind_of
from common.files import atomic_write
from common.text import plain

_METADATA_KEY = "hornet"
_MAX_PICKLE = 256 << 20  # bytes of the table of names and plain values


class _Arguments(dict):
    """Stands for argparse.Namespace: its attributes become entries, so that none can replace a method."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)


class _Dtype:
    """Stands for numpy.dtype: remembers the code of the type, such as `f8`, and does nothing."""

    def __init__(self, code: str, *_: object):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code  # byte order


def _scalar(dtype: _Dtype, raw: bytes) -> bool | int | float:
    """Stands for numpy's scalar(): the Python number in `raw`; an error for objects."""
    return np.frombuffer(raw, dtype.code, 1)[0].item()


_ALLOWED = [(_Arguments, "argparse.Namespace"), (_Dtype, "numpy.dtype"),
            (_scalar, "numpy._core.multiarray.scalar"), (_scalar, "numpy.core.multiarray.scalar")]


def safe_torch_load(path: str | os.PathLike) -> Any:
    """The content of a `.pth` (zip, or the older format) or `.safetensors` file: tensors and plain values.

    An `args` namespace comes back as a dict, NumPy scalars as Python numbers. A `.safetensors` file gives a
    flat dict of tensors, or {'model': tensors, ...} when `save_safetensors` wrote it with metadata.

    Raises UserError with one sentence: `missing_checkpoint`, `not_a_checkpoint` (a folder, text, …),
    `damaged_checkpoint` (truncated, CRC), `unsafe_checkpoint` (it needs code of its own, unpacks to more than
    its size, holds tensors that are not dense).
    """
    path = Path(path)
    head, size = _read_head(path)
    try:
        if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size):
            return _load_safetensors(path)
        if head.startswith(b"PK\x03\x04"):
            _check_zip(path, size)
        elif not head.startswith(b"\x80"):
            raise UserError(f"{path} is not a checkpoint: it begins with {head[:24]!r}; expected is a .pth "
                            "file from torch.save or a .safetensors file.", code="not_a_checkpoint")
        with torch.serialization.safe_globals(_ALLOWED):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(loaded, dict):
            loaded = {name: dict(v) if isinstance(v, _Arguments) else v for name, v in loaded.items()}
        _check_tensors(path, loaded, size)
        return loaded
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files, and all mean the same here
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs:
            raise UserError(f"{path} cannot be loaded: it needs {needs[1]}, which could run any code; save "
                            "only tensors and plain values.", code="unsafe_checkpoint") from None
        # Without torch's text, which advises to load with weights_only=False.
        raise UserError(f"{path} is truncated, damaged or no checkpoint ({type(error).__name__}); copy or "
                        "download it again.", code="damaged_checkpoint") from None


def _read_head(path: Path) -> tuple[bytes, int]:
    """The first bytes and the size of a regular file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a folder or not a regular file; name a .pth or .safetensors file.",
                        code="not_a_checkpoint")
    try:
        with open(path, "rb") as file:
            return file.read(64), os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind_of(error)(f"No checkpoint at {plain(str(path), 300)}: {reason}; check the path.",
                             code="missing_checkpoint") from None


def _check_zip(path: Path, size: int) -> None:
    """Refuse archives that unpack to more than they are; raises whatever zipfile does for damaged ones."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        compressed = any(m.compress_type != zipfile.ZIP_STORED for m in members)
        tables = [m.file_size for m in members if m.filename.endswith("data.pkl")]
        if compressed or sum(m.file_size for m in members) > size or max(tables, default=0) > _MAX_PICKLE:
            raise UserError(f"{path} could unpack to any size, unlike what torch.save writes; save it "
                            "again with torch.save.", code="unsafe_checkpoint")
        if archive.testzip():
            raise zipfile.BadZipFile("a CRC does not match")


def _check_tensors(path: Path, loaded: object, size: int) -> None:
    """Refuse tensors that a state of a network never has and that fail, or fill the memory, far from here."""
    for place, value in tree_flatten_with_path(loaded)[0]:
        if isinstance(value, torch.Tensor) and (value.is_meta or value.layout is not torch.strided
                                                or value.is_quantized or value.numel() > size):
            raise UserError(f"{path}: the tensor {keystr(place)[:80]} is not dense with its values "
                            "in the file; save it again from a plain model.", code="unsafe_checkpoint")


def _load_safetensors(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        metadata = (file.metadata() or {}).get(_METADATA_KEY)
    return tensors if metadata is None else {"model": tensors, **json.loads(metadata)}


def save_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write tensors atomically as `.safetensors`; `safe_torch_load` returns `metadata` (plain values) too."""
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Without the format transformers refuses the file.
    data = save(own, metadata={"format": "pt", _METADATA_KEY: json.dumps(metadata)})
    atomic_write(path, lambda file: file.write(data), reserve=len(data))
