"""A library is built once per kind of machine, and loaded only as it was built, here."""
import ctypes
from pathlib import Path

import pytest

from native import build

SOURCE = 'extern "C" int answer() { return 42; }\n'
pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hornet" / "native"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def load(source: Path, *flags: str) -> ctypes.CDLL | None:
    return build.load_compiled(source, flags, "The answer", "answers twice as fast")


def test_it_is_built_once_in_a_private_folder(cache, source):
    assert load(source).answer() == 42
    first = next(cache.glob("*.so")).stat()
    assert load(source).answer() == 42 and next(cache.glob("*.so")).stat() == first
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".sha256", ".so"]
    assert cache.stat().st_mode & 0o077 == 0


def test_a_build_of_another_cpu_compiler_source_or_with_other_flags_is_not_loaded(cache, source, tmp_path, monkeypatch):
    def builds():
        assert load(source, *flags) is not None
        return len(list(cache.glob("*.so")))

    flags, compiler = [], tmp_path / "c++"
    assert builds() == 1
    monkeypatch.setattr(build, "cpu_type", lambda: "another CPU")
    assert builds() == 2
    flags.append("-O2")
    assert builds() == 3
    source.write_text(SOURCE.replace("42", "43"))
    assert builds() == 4 and load(source, *flags).answer() == 43
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo another || exec c++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert builds() == 5


@pytest.mark.parametrize("harm", ["changed", "truncated", "no hash"])
def test_a_library_that_is_not_as_it_was_built_is_built_again(cache, source, harm):
    load(source)
    library, digest = next(cache.glob("*.so")), next(cache.glob("*.sha256"))
    content = bytearray(library.read_bytes())
    library.unlink()  # what is changed in place changes under this process, too, which has it loaded
    content[len(content) // 2] ^= harm == "changed"
    library.write_bytes(content[:4096] if harm == "truncated" else content)  # loading it would be a SIGBUS
    if harm == "no hash":
        digest.unlink()
    before = library.stat()
    assert load(source).answer() == 42 and library.stat() != before and digest.exists()


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_cache_folder_that_others_can_write_is_not_used(cache, source, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert load(source).answer() == 42
    assert not list(cache.iterdir())


@pytest.mark.parametrize("content,words", [
    (None, ("g++", "twice")), ("#include <not_there/jpeglib.h>\n", ("libjpeg-dev", "twice")),
    ("nonsense\nand more", ("nonsense",))], ids=["no compiler", "no jpeglib", "no C++"])
def test_what_cannot_be_built_is_one_line_with_package_and_gain_and_leaves_nothing(
        cache, source, monkeypatch, caplog, content, words):
    if content is None:
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    else:
        source.write_text(content)
    with caplog.at_level("INFO", "hornet"):
        assert load(source) is None
    message, = caplog.messages
    assert all(word in message for word in words)
    assert {p.suffix for p in cache.rglob("*.*")} <= {".lock"}
