"""Fetching published files once: over https, resumable, checked, and by hand where there is no network."""
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from common.errors import UserError
from common.files import fsync_folder, read_json, sha256_file, write_json
from common.log import logger
from models.zoo import PUBLISHED, PublishedFile, published_files

FOLDER_VARIABLE = "HORNET_CACHE"
_TRIES, _TIMEOUT, _CHUNK = 4, 30, 1 << 20
_LARGEST = 4 << 30


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """Where published files lie: the argument, else the environment's HORNET_CACHE, else ~/.cache/hornet."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/hornet").expanduser()


def fetch_published(name: str, folder: str | os.PathLike | None = None, source: str = "auto") -> Path:
    """Path of a published file of model `name`, downloaded when it is not in `folder` yet.

    Args:
        source: "openmmlab", "authors", or "auto": one that lies there already, else the first that can be had.

    Raises UserError when there is none, when it is damaged, or when it cannot be downloaded.
    """
    files = [file for file in published_files(name) if source in ("auto", file.source)]
    if not files:
        have = ", ".join(key for key in PUBLISHED if published_files(key))
        raise UserError(f"There is no published file for {name} (source {source}); there are files for {have}.")
    folder = cache_folder(folder)
    here = [file for file in files if (folder / file.name).exists()]
    if here:
        return fetch(here[0], folder)
    errors = []
    for file in files:
        try:
            return fetch(file, folder)
        except UserError as error:
            errors.append(str(error))
    raise UserError(" ".join(errors))


def fetch_url(url: str, folder: str | os.PathLike | None = None) -> Path:
    """Path of the file at any `url`; its name begins with a digest of the url, so that two never meet."""
    last = re.sub(r"[^\w.-]", "_", urllib.parse.unquote(urllib.parse.urlsplit(url).path).rstrip("/").rsplit("/", 1)[-1])
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{last or 'file.pth'}"
    return fetch(PublishedFile("url", name, (url,)), cache_folder(folder))


def fetch(file: PublishedFile, folder: Path) -> Path:
    """`folder / file.name`, downloaded if needed, checked against its published hash and the one pinned before.

    A pin (`<name>.json` with sha256 and size) is written at the first use, also of a file placed by hand.
    """
    path = folder / file.name
    _check_address(file.urls[0])
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f".{file.name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be fetching the same file
                if not path.exists():
                    _download(file, path)
        _check(file, path)
    except OSError as error:
        raise UserError(f"{file.name} cannot be kept in {folder}: {error.strerror or error}; name another folder "
                        f"with {FOLDER_VARIABLE}.") from error
    return path


def _check(file: PublishedFile, path: Path) -> None:
    digest, size, pin_path = sha256_file(path), path.stat().st_size, path.with_name(path.name + ".json")
    if not digest.startswith(file.sha256_prefix):
        raise UserError(f"{path} is not the published file: its sha256 begins with {digest[:8]}, published is "
                        f"{file.sha256_prefix}; remove it, and it is downloaded again.")
    pin = read_json(pin_path) if pin_path.exists() else None
    if pin is not None:
        if not isinstance(pin, dict) or (pin.get("sha256"), pin.get("size")) != (digest, size):
            raise UserError(f"{path} has changed since its first use (recorded in {pin_path.name}); remove both, "
                            "and it is downloaded again.")
        return
    try:
        write_json(pin_path, {"url": file.urls[0], "sha256": digest, "size": size})
    except OSError as error:  # a folder shared for reading only is fine, the file is merely not pinned
        logger.info("%s is not pinned: %s", path, error.strerror or error)


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise UserError(f"{url} is not an https address; files come over https only (http from this machine itself).")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(file: PublishedFile, path: Path) -> None:
    """Into `.name.part`, going on after a cut connection, then in one step to `path`."""
    part = path.with_name(f".{path.name}.part")
    logger.info("Downloading %s to %s", file.urls[0], path)
    reason = "no answer"
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(0.2 * 4 ** (attempt - 1))
        try:
            _transfer(file, part)
            break
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code == 416:  # the part is longer than the file: it is of another version
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                raise UserError(_by_hand(file, path, reason)) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    else:
        raise UserError(_by_hand(file, path, reason))
    digest = sha256_file(part)
    if not digest.startswith(file.sha256_prefix):
        part.unlink()
        raise UserError(_by_hand(file, path, f"what came has the sha256 {digest[:8]}..., not the published "
                                             f"{file.sha256_prefix}..."))
    with open(part, "rb") as done:
        os.fsync(done.fileno())
    os.replace(part, path)
    part.with_suffix(".etag").unlink(missing_ok=True)
    fsync_folder(path.parent)


def _transfer(file: PublishedFile, part: Path) -> None:
    """One connection. A part is gone on with only if the server can say that it is still the same file."""
    etag_path = part.with_suffix(".etag")
    etag = etag_path.read_text() if etag_path.exists() else ""
    have = part.stat().st_size if part.exists() and etag else 0
    request = urllib.request.Request(file.urls[0], headers={"User-Agent": "hornet"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag)
    opener = urllib.request.build_opener(_CheckedRedirects)
    with opener.open(request, timeout=_TIMEOUT) as response:
        if "text/html" in response.headers.get("Content-Type", ""):
            raise http.client.HTTPException("the server sent a web page instead of the file")
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if (total or 0) > _LARGEST:
            raise http.client.HTTPException(f"the file has {total} bytes, more than {_LARGEST}")
        validator = response.headers.get("ETag") or ""
        etag_path.write_text("" if validator.startswith("W/") else validator)
        with open(part, "ab" if have else "wb") as out:
            while chunk := response.read(_CHUNK):
                have += out.write(chunk)
                if have > _LARGEST:
                    raise http.client.HTTPException(f"the file has more than {_LARGEST} bytes")
    if total is not None and have != total:
        raise http.client.HTTPException(f"the connection was cut after {have} of {total} bytes")


def _by_hand(file: PublishedFile, path: Path, reason: str) -> str:
    return (f"{file.name} could not be downloaded from {file.urls[0]} ({reason}); fetch it elsewhere and put it at {path}, "
            f"or name the folder that holds it with {FOLDER_VARIABLE}.")
