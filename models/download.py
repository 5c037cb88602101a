"""Fetching published files once: over https, with retries, checked; and by hand where there is no network."""
import hashlib
import http.client
import os
import socket
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from torch.hub import download_url_to_file

from common.errors import UserError
from common.files import sha256_file
from common.log import logger
from common.safe_load import safe_torch_load
from models.zoo import VARIANTS, PublishedFile

FOLDER_VARIABLE, HUB_WEIGHTS = "HORNET_CACHE", "model.safetensors"
_TRIES, _PAUSE, _TIMEOUT = 3, 0.2, 30  # seconds before the second try, seconds without a byte


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """Where published files are kept: the argument, else HORNET_CACHE, else ~/.cache/hornet."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/hornet").expanduser()


def fetch_published(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Path of a published file of model `name`, in `folder` or `cache_folder()`.

    Raises UserError (`not_published`, and `download_failed` with every file that would do).
    """
    files = VARIANTS[name].files if name in VARIANTS else ()
    if not files:
        have = ", ".join(name for name, variant in VARIANTS.items() if variant.files)
        raise UserError(f"There is no published file for {name}; there are files for {have}.",
                        code="not_published")
    return fetch(files, cache_folder(folder))


def local_file(path_or_url: str | os.PathLike) -> str:
    """The path itself, or that of the downloaded file of an https address or a model `hf-hub:USER/NAME`.

    The file's name begins with a digest of the whole address, so that two addresses never share a file.
    """
    url = os.fspath(path_or_url)
    if url.startswith("hf-hub:"):
        return _from_hub(url)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{url} is not an https address; files come over https only.", code="not_https")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(parts.path).name or 'file.pth'}"
    return str(fetch([PublishedFile(name, url)], cache_folder()))


def _from_hub(model: str) -> str:
    """The weights of `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION` in the Hub's own cache."""
    from huggingface_hub import hf_hub_download

    name, _, revision = model.removeprefix("hf-hub:").partition("@")
    try:
        return hf_hub_download(name, HUB_WEIGHTS, revision=revision or None)
    except (OSError, ValueError) as error:  # no network, no such model, not public
        raise UserError(f"{HUB_WEIGHTS} of {model} is not available ({' '.join(str(error).split())[:200]}); "
                        "check the name, or log in with `hf auth login`.", code="download_failed") from error


def fetch(files: Sequence[PublishedFile], folder: Path) -> Path:
    """Path of one of `files`, which hold the same weights: one in `folder`, else the first to be downloaded.

    Each is checked, also when it was there. Raises UserError (`download_failed`) with the name of every file
    that would do, where to get it and where to put it.
    """
    problem = ""
    for file in sorted(files, key=lambda file: not (folder / file.name).exists()):
        path = folder / file.name
        problem = _problem(file, path) if path.exists() else _download(file, path)
        if not problem:
            return path
        logger.warning("%s cannot be used", file.name)
    wanted = " or ".join(f"{file.name} from {file.url}" for file in files)
    raise UserError(f"{problem}; get {wanted}, and put it into {folder} or a folder named by "
                    f"{FOLDER_VARIABLE}.", code="download_failed")


def _download(file: PublishedFile, path: Path) -> str:
    """Try a few times; returns "" or why the last try failed."""
    problem, before = "", socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub sets none, and a silent server would hang the run
    try:
        for attempt in range(_TRIES):
            time.sleep(_PAUSE * 4 ** attempt if problem else 0)
            logger.info("Downloading %s to %s", file.url, path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                download_url_to_file(file.url, str(path), file.sha256_prefix or None, sys.stderr.isatty())
                problem = _problem(file, path)  # without a hash, half a file passes for a whole one
                if not problem:
                    break
                path.unlink()
            except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another hash
                problem = f"the download failed ({' '.join(str(error).split()) or type(error).__name__})"
    finally:
        socket.setdefaulttimeout(before)
    return problem


def _problem(file: PublishedFile, path: Path) -> str:
    """Why the file at `path` is not the wanted one, "" if it is."""
    try:
        digest = sha256_file(path)
        if not digest.startswith(file.sha256_prefix):
            return f"{path} is not the published file: sha256 {digest[:8]}..., not {file.sha256_prefix}..."
        if not file.sha256_prefix:
            safe_torch_load(path)  # a web page, a login page or half a file shows here
    except (UserError, OSError) as error:
        return str(error).rstrip(".")
    return ""
