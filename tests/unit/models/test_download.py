"""Downloads from a real server on this machine: wrong hash, half a file, web page, silence, by hand."""
import hashlib
import http.server
import io
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from models import download
from models.download import cache_folder, fetch, fetch_published, local_file
from models.weights import to_openmmlab
from models.zoo import PUBLISHED, VARIANTS, PublishedFile
from tests.kits.errors import refused
from tests.kits.trained import lively

MODEL = lively()


def packed(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


ANSWERS = {"good": packed({"model": MODEL.state_dict()}),
           "openmmlab": packed({"state_dict": to_openmmlab(MODEL.state_dict()), "meta": {"epoch": 300}}),
           "page": b"<!DOCTYPE html><title>Log in</title>", "text": b"{\"error\": \"link expired\"}"}
DATA = ANSWERS["good"]
PREFIX = {kind: hashlib.sha256(data).hexdigest()[:8] for kind, data in ANSWERS.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, kind = self.server, self.path.strip("/").split(".")[0]
        server.asked.append(kind)
        bad, server.failures = server.failures > 0, server.failures - 1
        if kind == "missing" or kind == "busy" and bad:
            self.send_error(404 if kind == "missing" else 503)
            return
        if kind == "silent" and bad:
            threading.Event().wait(1.5)
        body = ANSWERS.get(kind, DATA)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if kind == "half" and bad else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(download, "_TIMEOUT", 0.5)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.failures, server.asked, server.handle_error = 0, [], lambda *who: None  # a silent one is left waiting
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def published(server, kind, prefix=PREFIX["good"]):
    return [PublishedFile("model.pth", f"{server.url}/{kind}.pth", prefix)]


def test_a_whole_file_is_downloaded_once(server, tmp_path):
    path = fetch(published(server, "good"), tmp_path / "new" / "folder")
    assert path.read_bytes() == DATA and fetch(published(server, "good"), path.parent) == path
    assert server.asked == ["good"] and [p.name for p in path.parent.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("kind, failures", [("busy", 2), ("half", 2), ("silent", 1)])
@pytest.mark.parametrize("prefix", [PREFIX["good"], ""])
def test_a_failed_download_is_retried(server, tmp_path, kind, failures, prefix):
    server.failures = failures
    assert fetch(published(server, kind, prefix), tmp_path).read_bytes() == DATA
    assert len(server.asked) == failures + 1


@pytest.mark.parametrize("kind, prefix", [("missing", PREFIX["good"]), ("page", ""), ("page", PREFIX["good"]),
                                          ("text", ""), ("good", "00000000")])
def test_another_answer_is_one_sentence_with_name_address_and_place(server, tmp_path, kind, prefix):
    with refused("download_failed", "model.pth", f"{server.url}/{kind}.pth", tmp_path, "HORNET_CACHE"):
        fetch(published(server, kind, prefix), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kinds", [("openmmlab", "good"), ("good", "openmmlab"), ("missing", "good"),
                                   ("page", "openmmlab")])
def test_each_source_in_either_naming_gives_the_same_model(server, tmp_path, monkeypatch, kinds):
    """`pretrained=True` takes the first source whose answer is the file, whatever its tensors are called."""
    files = tuple(PublishedFile(f"{kind}.pth", f"{server.url}/{kind}.pth", PREFIX["openmmlab"] if kind == "openmmlab" else "")
                  for kind in kinds)
    monkeypatch.setitem(VARIANTS, "hornet_pico_gf", replace(VARIANTS["hornet_pico_gf"], files=files))
    model = timm.create_model("hornet_pico_gf", pretrained=True, num_classes=4, cache_dir=tmp_path)
    assert all(torch.equal(value, MODEL.state_dict()[name]) for name, value in model.state_dict().items())
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
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with refused("not_published", "hornet_tiny_7x7"):
        fetch_published("hornet_pico_gf", tmp_path)
    (tmp_path / "file").write_text("in the way")
    files = PUBLISHED["hornet_tiny_7x7"].files
    for folder in (tmp_path, tmp_path / "file" / "below"):
        with refused("download_failed", *(part for file in files for part in (file.url, file.name)), folder):
            fetch_published("hornet_tiny_7x7", folder)
    for file, data, fits in ((files[1], DATA, True), (files[1], ANSWERS["page"], False), (files[0], DATA, False)):
        (tmp_path / file.name).write_bytes(data)  # the second one has no published hash
        with nullcontext() if fits else refused("download_failed", file.url):
            assert fetch_published("hornet_tiny_7x7", tmp_path).name == file.name
        assert (tmp_path / file.name).read_bytes() == data
