"""Reading checkpoints from anywhere without running anything in them.

A `.pth` file is a pickle: an ordinary `torch.load` would run whatever program its author put there.
`weights_only=True` rebuilds tensors and plain containers only. What older training files hold besides
(the `args` namespace, NumPy scalars) is rebuilt here by classes of our own that can only hold values, so
that neither argparse nor NumPy takes part. torch does not notice flipped bits, hence the CRC check.
"""
import json
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_write
from common.text import plain

_METADATA_KEY = "hornet"
_MAX_PICKLE = 256 << 20


class _Arguments(dict):
    """Stands for argparse.Namespace: its attributes become entries, so that none can replace a method."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)


class _Dtype:
    """Stands for numpy.dtype: remembers what it was made of and does nothing."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _scalar(dtype: _Dtype, raw: bytes | str) -> bool | int | float:
    """Stands for numpy's scalar(): the Python number in `raw`; an error for objects."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, np.dtype(f"{dtype.order}{dtype.code}"), 1)[0].item()


_ALLOWED = [(_Arguments, "argparse.Namespace"), (_Dtype, "numpy.dtype"),
            (_scalar, "numpy._core.multiarray.scalar"), (_scalar, "numpy.core.multiarray.scalar")]


def safe_torch_load(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> Any:
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
            return _load_safetensors(path, size, map_location)
        if head.startswith(b"PK\x03\x04"):
            _check_zip(path, size)
        elif not head.startswith(b"\x80"):
            begins = f"begins with {head[:24]!r}" if head else "is empty"
            raise UserError(f"{path} is not a checkpoint: it {begins}; expected is a .pth file from "
                            "torch.save or a .safetensors file.", code="not_a_checkpoint")
        with torch.serialization.safe_globals(_ALLOWED):
            loaded = torch.load(path, map_location=map_location, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files, and all mean the same here
        raise _refusal(path, error) from None
    _check_tensors(path, loaded, size)
    if isinstance(loaded, dict):
        return {name: dict(v) if isinstance(v, _Arguments) else v for name, v in loaded.items()}
    return loaded


def _read_head(path: Path) -> tuple[bytes, int]:
    """The first bytes and the size of a regular file."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
            raise UserError(f"{path} is {kind}; name a .pth or .safetensors file.", code="not_a_checkpoint")
        with open(path, "rb") as file:
            return file.read(64), info.st_size
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"No checkpoint at {plain(str(path), 300)}: {reason}; check the path.",
                        code="missing_checkpoint") from None


def _check_zip(path: Path, size: int) -> None:
    """Refuse archives that unpack to more than they are, and damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            compressed = any(m.compress_type != zipfile.ZIP_STORED for m in members)
            pickled = max((m.file_size for m in members if m.filename.endswith("data.pkl")), default=0)
            if compressed or sum(m.file_size for m in members) > size or pickled > _MAX_PICKLE:
                raise UserError(f"{path} could unpack to any size, unlike what torch.save writes; save it "
                                "again with torch.save.", code="unsafe_checkpoint")
            damaged = archive.testzip() and "the checksum (CRC) of a member does not match"
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"{path} is truncated or damaged ({damaged}); copy or download it again.",
                        code="damaged_checkpoint")


def _check_tensors(path: Path, loaded: object, size: int) -> None:
    """Refuse tensors that a state of a network never has and that fail, or fill the memory, far from here."""
    waiting, seen = [("", loaded)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            problem = ("no values (it is on the meta device)" if value.is_meta else
                       "a sparse layout" if value.layout is not torch.strided else
                       "quantised values" if value.is_quantized else
                       "more values than the file has bytes" if value.numel() > size else "")
            if problem:
                raise UserError(f"{path}: the tensor {name[1:81]} has {problem}, and checkpoints hold dense "
                                "tensors; save it again from a plain model.", code="unsafe_checkpoint")
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            waiting.extend((f"{name}.{key}", inner) for key, inner in pairs)


def _load_safetensors(path: Path, size: int, map_location: str | torch.device) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            metadata = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole .safetensors file of {size} bytes ({error}); copy or "
                        "download it again.", code="damaged_checkpoint") from None
    return tensors if metadata is None else {"model": tensors, **json.loads(metadata)}


def save_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor],
                     metadata: dict | None = None) -> None:
    """Write tensors atomically as `.safetensors`; `safe_torch_load` returns `metadata` (plain values) too."""
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = None if metadata is None else {_METADATA_KEY: json.dumps(metadata)}
    data = save(own, metadata=header)
    atomic_write(path, lambda file: file.write(data), reserve=len(data))


def _refusal(path: Path, error: Exception) -> UserError:
    """What torch.load's error means, without its advice to load with weights_only=False."""
    needs = re.search(r"GLOBAL (\S+)", str(error))
    if needs:
        return UserError(f"{path} cannot be loaded: it needs {needs[1]}, which could run any code; save only "
                         "tensors and plain values, such as a state_dict.", code="unsafe_checkpoint")
    reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0]
    reason = type(error).__name__ if not reason or "weights_only" in reason else reason[:200].rstrip(".")
    return UserError(f"{path} cannot be loaded: it is damaged or no checkpoint ({reason}); copy or download "
                     "it again.", code="damaged_checkpoint")
