"""Reading checkpoints from anywhere without running anything in them.

A `.pth` file is a pickle: an ordinary `torch.load` would run whatever program its author put there.
`weights_only=True` rebuilds tensors and plain containers only. What older training files hold besides
(the `args` namespace, NumPy scalars) is rebuilt here by classes of our own that can only hold values, so
that neither argparse nor NumPy takes part. torch does not notice flipped bits, hence the CRC check.
"""
import json
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import atomic_write

_METADATA_KEY = "hornet"
_MAX_PICKLE = 256 << 20
_NUMPY_CODES = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
                "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}


class _Arguments(dict):
    """Stands for argparse.Namespace: its attributes become entries, so that none can replace a method."""

    def __setstate__(self, state):
        self.update(state)


class _Dtype:
    """Stands for numpy.dtype: remembers the code of a plain number and nothing else."""

    def __init__(self, code, *_):
        self.code = _NUMPY_CODES[code.decode() if isinstance(code, bytes) else code]
        self.order = "<"

    def __setstate__(self, state):
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = ">" if order == ">" else "<"


def _scalar(dtype: _Dtype, raw: bytes | str):
    """Stands for numpy's scalar(): the Python number in `raw`."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return struct.unpack(dtype.order + dtype.code, raw)[0]


_ALLOWED = [(_Arguments, "argparse.Namespace"), (_Dtype, "numpy.dtype"),
            (_scalar, "numpy._core.multiarray.scalar"), (_scalar, "numpy.core.multiarray.scalar")]


def safe_torch_load(path: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """The content of a `.pth` (zip, or the older format) or `.safetensors` file: tensors and plain values.

    An `args` namespace comes back as a dict, NumPy scalars as Python numbers. A `.safetensors` file gives a
    flat dict of tensors, or {'model': tensors, ...} when `save_safetensors` wrote it with metadata.

    Raises UserError with one sentence when the file is missing, a folder, text, truncated, damaged (CRC),
    compressed (a small file could unpack to fill the memory) or would need code of its own to load.
    """
    path = Path(path)
    head, size = _read_head(path)
    try:
        if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size):
            return _load_safetensors(path, size, map_location)
        if head.startswith(b"PK\x03\x04"):
            _check_zip(path, size)
        elif not head.startswith(b"\x80"):
            raise UserError(f"{path} is not a checkpoint: {_describe(head)}; expected a .pth file from torch.save "
                            "or a .safetensors file.")
        with torch.serialization.safe_globals(_ALLOWED):
            loaded = torch.load(path, map_location=map_location, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files, and all mean the same here
        raise UserError(f"{path} cannot be loaded: {_first_sentence(error)}") from error
    return _plain(loaded)


def _read_head(path: Path) -> tuple[bytes, int]:
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            inside = sorted(p.name for p in path.glob("*") if p.suffix in (".pth", ".safetensors"))[:3]
            raise UserError(f"{path} is a folder, not a checkpoint; name a file in it"
                            + (f", such as {inside[-1]}." if inside else " (it holds no .pth file)."))
        if not stat.S_ISREG(info.st_mode):
            raise UserError(f"{path} is not a regular file; name a .pth or .safetensors file.")
        with open(path, "rb") as file:
            return file.read(64), info.st_size
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No checkpoint at {path}; check the path.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _describe(head: bytes) -> str:
    if not head:
        return "it is empty"
    known = ((b"version https://git-lfs", "it is a Git LFS pointer, the file itself was not fetched"),
             (b"\x1f\x8b", "it is a gzip archive, unpack it first"),
             (b"<", "it is a web page or XML, perhaps an error page saved by a download"))
    for magic, words in known:
        if head.lstrip().startswith(magic):
            return words
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "it is a text file" if is_text else "its first bytes are of no known checkpoint format"


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise UserError(f"{path} holds compressed members, which torch.save never writes and which could "
                                "unpack to any size; save it again with torch.save.")
            if sum(member.file_size for member in members) > size:
                raise UserError(f"{path} claims more bytes than it has; it is damaged or made to harm.")
            if any(m.filename.endswith("data.pkl") and m.file_size > _MAX_PICKLE for m in members):
                raise UserError(f"{path} has an object table above {_MAX_PICKLE >> 20} MiB; it is no checkpoint.")
            damaged = archive.testzip()
    except UserError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({_first_sentence(error)}); "
                        "copy or download it again.") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum (CRC) of its member {damaged} does not match; "
                        "copy or download it again.")


def _load_safetensors(path: Path, size: int, map_location: Any) -> Any:
    from safetensors import SafetensorError, safe_open

    device = str(map_location if map_location is not None else "cpu")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole .safetensors file of {size} bytes ({_first_sentence(error)}); "
                        "copy or download it again.") from error
    return tensors if metadata is None else {"model": tensors, **json.loads(metadata)}


def save_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
    """Write tensors atomically as `.safetensors`; `metadata` (plain values) comes back from `safe_torch_load`."""
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = None if metadata is None else {_METADATA_KEY: json.dumps(metadata)}
    data = save(own, metadata=header)
    atomic_write(path, lambda file: file.write(data), reserve=len(data))


def _plain(loaded: Any) -> Any:
    """Turn our stand-ins at the places where training files have them into ordinary dicts."""
    if isinstance(loaded, _Arguments):
        return dict(loaded)
    if isinstance(loaded, dict):
        for name, value in loaded.items():
            if isinstance(value, _Arguments):
                loaded[name] = dict(value)
    return loaded


def _first_sentence(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "Unsupported global" in text or "GLOBAL" in text:
        name = text.split("GLOBAL ", 1)[-1].split(" ", 1)[0]
        return f"it wants to run {name} while loading, which only an untrusted or foreign file does."
    if "TorchScript" in text:
        return "it is a TorchScript archive, not a state dict."
    text = text.replace("Weights only load failed.", "").strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".") + "."
