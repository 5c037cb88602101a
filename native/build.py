"""Build a C++ file with the system's compiler on first use and load it; None, with one line, where that
cannot be done.

The library lies in the user's cache folder under a name made of source, compiler, flags and CPU type, so it
is built once per kind of machine (a home folder can be shared by several): the first process builds while
others wait for its lock. Beside it lies its SHA-256, without which it is not loaded but built again: a
library is code that is executed.
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


def load_compiled(source: Path, flags: Sequence[str], part: str, gain: str) -> ctypes.CDLL | None:
    """The library of `source`, built with `flags` (and -shared -fPIC), or None with one line in the log.

    part: what the library is, in words that open the line.
    gain: what it would gain, with the measured factor, in words that end the line.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.info("%s: no C++ compiler, so plain code does the same; the Debian package g++ %s.",
                    part, gain)
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
        identity = (source.read_bytes(), version, repr(tuple(flags)).encode(), cpu_type().encode())
        name = f"{source.stem}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:24]}"
        path = cache_folder() / f"{name}.so"
        if not _intact(path):
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _intact(path):
                    _build([compiler, *flags, "-shared", "-fPIC", str(source)], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
        if "jpeglib.h" in detail:
            logger.info("%s: jpeglib.h is missing, so plain code does the same; the Debian package "
                        "libjpeg-dev %s.", part, gain)
        else:
            logger.info("%s: not built, so plain code does the same: %s", part, detail[:300].splitlines()[:1])
        return None


def _build(command: list[str], path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        subprocess.run([*command, "-o", str(part)], capture_output=True, check=True, timeout=180)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        os.replace(part, path)  # a process that has the old one loaded keeps it
    finally:
        part.unlink(missing_ok=True)
    part.write_text(digest)
    os.replace(part, path.with_suffix(".sha256"))


def _intact(path: Path) -> bool:
    """Whether the library is there, whole, as it was built."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text()
    except OSError:
        return False


def cpu_type() -> str:
    """Model and instruction sets of this CPU: -march=native makes code that another kind may not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    kinds = ("flags", "Features", "model name", "CPU implementer", "CPU part")
    return " ".join(line for line in lines[:40] if line.startswith(kinds))


def cache_folder() -> Path:
    """A folder that only this user can write: a library in it is executed."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hornet" / "native"
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = base.stat()
        private = info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if private and os.access(base, os.W_OK):
            return base
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="hornet-native-"))
