"""Build a C++ file with the system's compiler on first use and load it; None where that cannot be done.

The library lies in the user's cache folder under a name made of source, compiler, flags and CPU, so it is built once
per machine kind: the first process builds while others wait for its lock.
"""
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.log import logger

OFF = "HORNET_NATIVE"  # environment variable: 0 keeps everything in plain PyTorch and Pillow


def switched_off() -> bool:
    """Whether the user wants none of this package."""
    return os.environ.get(OFF) == "0"


def load_compiled(source: Path, flags: Sequence[str], purpose: str) -> ctypes.CDLL | None:
    """The library of `source`, built with `flags` (and -shared -fPIC), or None with one line in the log.

    purpose: what the library is for, in words that open the log's sentence.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.info("%s: no C++ compiler, so the slower way is used (same results).", purpose)
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
        identity = (source.read_bytes(), version, repr(tuple(flags)).encode(), _cpu_flags().encode())
        name = f"{source.parent.name}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:24]}"
        folder = _cache_folder()
        path = folder / f"{name}.so"
        if not path.exists():
            with open(folder / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _build([compiler, *flags, "-shared", "-fPIC", str(source)], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
        logger.info("%s: not built, so the slower way is used (same results): %s", purpose, detail.splitlines()[:1])
        return None


def _build(command: list[str], path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run([*command, "-o", str(part)], capture_output=True, check=True, timeout=180)
    os.replace(part, path)


def _cpu_flags() -> str:
    """The instruction sets of this CPU: a home folder can be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return " ".join(line for line in lines[:40] if line.startswith(("flags", "Features", "model name")))


def _cache_folder() -> Path:
    """A folder that only this user can write: a library in it is executed."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hornet" / "kernels"
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = base.stat()
        if info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(base, os.W_OK):
            return base
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="hornet-kernels-"))
