"""A library is built once per kind of machine, and loaded only as it was built, here."""
import pytest

from native import build

SOURCE = 'extern "C" int answer() { return 42; }\n'
pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "answer.cpp").write_text(SOURCE)
    return tmp_path / "cache" / "hornet" / "native"


@pytest.fixture
def load(cache, tmp_path):
    return lambda *flags: build.load_compiled(tmp_path / "answer.cpp", flags, "The answer", "answers twice as fast")


def test_it_is_built_once_per_cpu_compiler_source_and_flags_in_a_private_folder(cache, load, tmp_path, monkeypatch):
    def builds(answer=42):
        assert load(*flags).answer() == answer
        return sorted(path.stat().st_mtime_ns for path in cache.glob("*.so"))

    flags, compiler = [], tmp_path / "c++"
    assert builds() == builds() and len(builds()) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".sha256", ".so"]
    assert cache.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(build, "cpu_type", lambda: "another CPU")
    assert len(builds()) == 2
    flags.append("-O2")
    assert len(builds()) == 3
    (tmp_path / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert len(builds(answer=43)) == 4
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo another || exec c++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert len(builds(answer=43)) == 5


@pytest.mark.parametrize("harm", ["changed", "truncated", "no hash"])
def test_a_library_that_is_not_as_it_was_built_is_built_again(cache, load, harm):
    load()
    library, digest = next(cache.glob("*.so")), next(cache.glob("*.sha256"))
    content = bytearray(library.read_bytes())
    library.unlink()  # what is changed in place changes under this process, too, which has it loaded
    content[len(content) // 2] ^= harm == "changed"
    library.write_bytes(content[:4096] if harm == "truncated" else content)  # loading it would be a SIGBUS
    if harm == "no hash":
        digest.unlink()
    before = library.stat()
    assert load().answer() == 42 and library.stat() != before and digest.exists()


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_cache_folder_that_others_can_write_is_not_used(cache, load, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert load().answer() == 42 and not list(cache.iterdir())


@pytest.mark.parametrize("content, words", [
    (None, ("g++", "twice")), ("#include <not_there/jpeglib.h>\n", ("libjpeg-dev", "twice")), ("nonsense", ("nonsense",))])
def test_what_cannot_be_built_is_one_line_with_package_and_gain(cache, load, tmp_path, monkeypatch, logged, content, words):
    if content is None:
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    (tmp_path / "answer.cpp").write_text(content or SOURCE)
    assert load() is None
    message, = logged.messages
    assert all(word in message for word in words) and {path.suffix for path in cache.rglob("*.*")} <= {".lock"}
