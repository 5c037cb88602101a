"""Downloads against a real server on this machine: wrong hash, cut connection, 404, resumption, by hand."""
import hashlib
import http.server
import json
import threading

import pytest

from common.errors import UserError
from models import download
from models.download import cache_folder, fetch, fetch_published, fetch_url
from models.zoo import PublishedFile

DATA = bytes(range(256)) * 8192  # 2 MiB
DIGEST = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, start = self.server, 0
        server.ranges.append(self.headers.get("Range"))
        if self.path.startswith("/missing"):
            return self.send_error(404)
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "http://example.org/file.pth")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if server.failures and self.path.startswith("/busy"):
            server.failures -= 1
            return self.send_error(503)
        if self.headers.get("Range") and self.headers.get("If-Range") == server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", "text/html" if self.path.startswith("/page") else "application/octet-stream")
        self.send_header("Content-Length", str(len(server.data) - start))
        self.end_headers()
        end = len(server.data)
        if self.path.startswith("/cut") and server.failures:
            server.failures -= 1
            end = start + server.cut
            self.close_connection = True
        self.wfile.write(server.data[start:end])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.etag, server.failures, server.ranges, server.cut = DATA, '"v1"', 0, [], len(DATA) // 3
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def published(server, where="file.pth", prefix=DIGEST[:8]):
    return PublishedFile("test", "model.pth", f"{server.url}/{where}", prefix)


def test_whole_file_is_fetched_once_and_pinned(server, tmp_path):
    path = fetch(published(server), tmp_path / "new" / "folder")
    assert path.read_bytes() == DATA
    pin = json.loads((path.parent / "model.pth.json").read_text())
    assert (pin["sha256"], pin["size"]) == (DIGEST, len(DATA))
    assert fetch(published(server), path.parent) == path and len(server.ranges) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [".model.pth.lock", "model.pth", "model.pth.json"]


def test_a_cut_connection_goes_on_where_it_ended(server, tmp_path):
    server.failures = 2
    assert fetch(published(server, "cut.pth"), tmp_path).read_bytes() == DATA
    third = len(DATA) // 3
    assert server.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"]


def test_a_later_call_goes_on_too(server, tmp_path):
    server.failures, server.cut = 100, 1000
    with pytest.raises(UserError, match=r"could not be downloaded from http://127.* \(.*\); fetch it elsewhere and put "
                                        rf"it at {tmp_path / 'model.pth'}.*HORNET_CACHE"):
        fetch(published(server, "cut.pth"), tmp_path)
    assert not (tmp_path / "model.pth").exists()
    server.failures, server.ranges[:] = 0, []
    assert fetch(published(server, "cut.pth"), tmp_path).read_bytes() == DATA
    assert server.ranges[0].startswith("bytes=")


@pytest.mark.parametrize("etag", ['"v2"', ""])
def test_parts_of_another_version_are_not_joined(server, tmp_path, etag):
    server.failures = 1
    server.etag = etag or '"v1"'
    (tmp_path / ".model.pth.part").write_bytes(b"old" * 1000)
    (tmp_path / ".model.pth.etag").write_text('"v1"' if etag else "")
    assert fetch(published(server), tmp_path).read_bytes() == DATA


def test_wrong_hash_is_refused_and_nothing_stays(server, tmp_path):
    with pytest.raises(UserError, match="not the published 00000000"):
        fetch(published(server, prefix="00000000"), tmp_path)
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob(".*part"))


@pytest.mark.parametrize("where,words", [
    ("missing.pth", "answered 404"), ("page.pth", "web page"), ("redirect.pth", "https only")])
def test_other_answers_name_the_file_to_place_by_hand(server, tmp_path, where, words):
    with pytest.raises(UserError, match=words):
        fetch(published(server, where), tmp_path)


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.failures = 2
    assert fetch(published(server, "busy.pth"), tmp_path).exists() and len(server.ranges) == 3


def test_without_a_published_hash_the_first_use_is_pinned(server, tmp_path):
    path = fetch(published(server, prefix=""), tmp_path)
    path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(UserError, match="has changed since its first use"):
        fetch(published(server, prefix=""), tmp_path)


def test_a_file_placed_by_hand_is_checked_and_needs_no_server(tmp_path):
    file = PublishedFile("test", "model.pth", "https://127.0.0.1:9/model.pth", DIGEST[:8])
    (tmp_path / "model.pth").write_bytes(DATA)
    assert fetch(file, tmp_path) == tmp_path / "model.pth" and (tmp_path / "model.pth.json").exists()
    (tmp_path / "model.pth.json").unlink()
    (tmp_path / "model.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="not the published file"):
        fetch(file, tmp_path)


def test_only_https_except_from_this_machine(tmp_path):
    for url in ("http://example.org/a.pth", "ftp://127.0.0.1/a.pth", "file:///etc/passwd", "http://127.0.0.1.evil/a"):
        with pytest.raises(UserError, match="https"):
            fetch(PublishedFile("test", "a.pth", url), tmp_path)


def test_any_address_gets_a_name_of_its_own(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HORNET_CACHE", str(tmp_path))
    a, b = fetch_url(f"{server.url}/x/../..%2f..%2fbest.pth?dl=1"), fetch_url(f"{server.url}/y/best.pth")
    assert a != b and a.parent == b.parent == tmp_path == cache_folder() and a.read_bytes() == DATA


def test_no_published_file(tmp_path):
    with pytest.raises(UserError, match="no published file for hornet_pico_gf .* there are files for hornet_tiny_7x7,"):
        fetch_published("hornet_pico_gf", tmp_path)


def test_offline_names_every_file_that_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError) as error:
        fetch_published("hornet_tiny_7x7", tmp_path)
    assert f"{tmp_path}/hornet-tiny_3rdparty_in1k_20220915-0e8eedff.pth" in str(error.value)
    assert f"{tmp_path}/hornet_tiny_7x7.pth" in str(error.value)
