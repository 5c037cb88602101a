"""Downloads from a real server on this machine: wrong hash, half a file, web page, silence, by hand."""
import hashlib
import io
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from models import download
from models.download import cache_folder, fetch, fetch_published, local_file
from models.weights import to_openmmlab
from models.zoo import PUBLISHED, VARIANTS, PublishedFile
from tests.kits.errors import refused
from tests.kits.server import serving
from tests.kits.trained import lively

STATE = lively().state_dict()


def packed(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


DATA, PAGE = packed({"model": STATE}), b"<!DOCTYPE html><title>Log in</title>"
ANSWERS = {"good": DATA, "openmmlab": packed({"state_dict": to_openmmlab(STATE), "meta": {"epoch": 300}}),
           "page": PAGE, "text": b"{\"error\": \"link expired\"}"}
PREFIX = hashlib.sha256(DATA).hexdigest()[:8]


@pytest.fixture
def server(monkeypatch):
    """Its `url`, the kinds `asked` for, and the number of `failures` that are still to come."""
    def answer(path):
        kind, body = path.strip("/").split(".")[0], ANSWERS.get(path.strip("/").split(".")[0], DATA)
        state.asked.append(kind)
        bad, state.failures = state.failures > 0, state.failures - 1
        if kind == "silent" and bad:
            time.sleep(1.5)
        status = 404 if kind == "missing" else 503 if kind == "busy" and bad else 200
        return status, body[:len(body) // 2] if kind == "half" and bad else body, len(body)

    state = SimpleNamespace(asked=[], failures=0)
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    monkeypatch.setattr(download, "_TIMEOUT", 0.5)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(answer) as state.url:
        yield state


def published(server, kind, prefix=""):
    return PublishedFile(f"{kind}.pth", f"{server.url}/{kind}.pth", prefix)


@pytest.mark.parametrize("kind, failures", [("good", 0), ("busy", 2), ("half", 2), ("silent", 1)])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_a_failed_download_is_retried_and_a_whole_file_asked_for_once(server, tmp_path, kind, failures, prefix):
    server.failures = failures
    for _ in range(2):
        assert fetch([published(server, kind, prefix)], tmp_path / "new" / "folder").read_bytes() == DATA
    assert server.asked == [kind] * (failures + 1) and len([*(tmp_path / "new" / "folder").iterdir()]) == 1


@pytest.mark.parametrize("kind, prefix", [("missing", PREFIX), ("page", ""), ("page", PREFIX), ("text", ""), ("good", "0000")])
def test_another_answer_is_one_sentence_with_name_address_and_place(server, tmp_path, kind, prefix):
    with refused("download_failed", f"{kind}.pth", f"{server.url}/{kind}.pth", tmp_path, "HORNET_CACHE"):
        fetch([published(server, kind, prefix)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kinds", [("openmmlab", "good"), ("good", "openmmlab"), ("missing", "good"), ("page", "openmmlab")])
def test_each_source_in_either_naming_gives_the_same_model(server, tmp_path, monkeypatch, kinds):
    """`pretrained=True` takes the first source whose answer is the file, whatever its tensors are called."""
    files = tuple(published(server, kind, PREFIX if kind == "good" else "") for kind in kinds)
    monkeypatch.setitem(VARIANTS, "hornet_pico_gf", replace(VARIANTS["hornet_pico_gf"], files=files))
    model = timm.create_model("hornet_pico_gf", pretrained=True, num_classes=4, cache_dir=tmp_path)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    assert server.asked[-1] == next(kind for kind in kinds if kind in ("good", "openmmlab"))


def test_addresses_are_https_and_each_gets_a_name_of_its_own(server, tmp_path, monkeypatch):
    for url in ("http://example.org/a.pth", "http://127.0.0.1.evil/a"):
        with refused("not_https", url):
            local_file(url)
    assert local_file(tmp_path / "a.pth") == str(tmp_path / "a.pth")
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    a, b = (Path(local_file(server.url + end)) for end in ("/x/../..%2f..%2fbest.pth?dl=1", "/y/best.pth"))
    assert a != b and a.parent == b.parent == tmp_path == cache_folder() and a.read_bytes() == DATA


def test_a_file_placed_by_hand_is_checked_and_needs_no_server_else_every_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with refused("not_published", "hornet_tiny_7x7"):
        fetch_published("hornet_pico_gf", tmp_path)
    (tmp_path / "file").write_text("in the way")
    files = PUBLISHED["hornet_tiny_7x7"].files
    for folder in (tmp_path, tmp_path / "file" / "below"):
        with refused("download_failed", *(part for file in files for part in (file.url, file.name)), folder):
            fetch_published("hornet_tiny_7x7", folder)
    for file, data, fits in ((files[1], DATA, True), (files[1], PAGE, False), (files[0], DATA, False)):
        (tmp_path / file.name).write_bytes(data)  # the second one has no published hash
        with nullcontext() if fits else refused("download_failed", file.url):
            assert fetch_published("hornet_tiny_7x7", tmp_path).name == file.name
        assert (tmp_path / file.name).read_bytes() == data
