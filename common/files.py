"""Files that are whole or not there: atomic writes, JSON with a size limit, checksums."""
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, kind_of

TEMPORARY_SUFFIX = ".tmp"
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EROFS, errno.EACCES)


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], object], reserve: int = 0,
                 before_rename: Callable[[str, int], None] | None = None) -> tuple[str, int]:
    """Write a file so that `path` is the old file or the whole new one, whatever happens in between.

    The bytes go to a temporary file in the same folder, which is flushed, fsynced and renamed; then the
    folder is fsynced, which makes the rename itself last.

    Args:
        path: where the file shall stand.
        write: gets a binary file opened for sequential writing.
        reserve: bytes to reserve first, so that a full disk is an OSError before anything is written.
        before_rename: called with (sha256, size) when the new bytes are safe and the old file still stands.

    Returns: (sha256 in hex, size in bytes). Raises OSError; the temporary file is then removed.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name[:180]}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        with open(temporary, "xb", buffering=1 << 20) as file:
            if reserve and hasattr(os, "posix_fallocate"):
                with _where_supported():
                    os.posix_fallocate(file.fileno(), 0, reserve)
            write(file)
            size = file.tell()
            file.truncate()
            os.fsync(file.fileno())
        digest = sha256_file(temporary)  # from the page cache
        if before_rename is not None:
            before_rename(digest, size)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with _where_supported(), ExitStack() as stack:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        os.fsync(folder)
    return digest, size


@contextmanager
def _where_supported() -> Iterator[None]:
    """Some network file systems can neither reserve nor fsync a folder, and some folders cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: str | os.PathLike, max_bytes: int = 64 << 20) -> Any:
    """The value in a JSON file.

    Raises: FileNotFoundError when it is missing; UserError (`unreadable_file`) when it cannot be read, is
    longer than `max_bytes` or not JSON.
    """
    text = read_text(path, max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); remove it or name another.",
                        code="unreadable_file") from error


def read_text(path: str | os.PathLike, max_bytes: int) -> str:
    """UTF-8 text, other bytes as surrogates.

    Raises: FileNotFoundError; UserError (`unreadable_file`) when it cannot be read or is longer.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise kind_of(error)(f"{path} cannot be read ({error.strerror}); remove it or name another.",
                             code="unreadable_file") from error
    if len(raw) > max_bytes:
        raise UserError(f"{path} has more than the {max_bytes} bytes expected; remove it or name another.",
                        code="unreadable_file")
    return raw.decode("utf-8", "surrogateescape")


def append_json_line(path: str | os.PathLike, record: dict) -> None:
    """Append one record to a file of JSON lines, after ending a line that a crash has cut short."""
    line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode("utf-8", "surrogateescape"))


def read_json_lines(path: str | os.PathLike) -> list[dict]:
    """The records of a file of JSON lines, [] when it is missing; lines cut short by a crash are skipped.

    Raises: UserError (`unreadable_file`) when it cannot be read, as when it is a folder.
    """
    records = []
    with suppress(FileNotFoundError):
        for line in read_text(path, 1 << 30).split("\n"):
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def sha256_file(path: str | os.PathLike) -> str:
    """sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
