"""A library is built once per kind of machine, and loaded only as it was built, here."""
import ctypes
import subprocess
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


@pytest.fixture
def builds(monkeypatch):
    """Every call of the compiler that builds."""
    calls, run = [], subprocess.run

    def counted(command, **arguments):
        if "-shared" in command:
            calls.append(command)
        return run(command, **arguments)
    monkeypatch.setattr(build.subprocess, "run", counted)
    return calls


def load(source: Path, *flags: str) -> ctypes.CDLL | None:
    return build.load_compiled(source, flags, "The answer", "answers twice as fast")


def test_it_is_built_once_in_a_private_folder(cache, source, builds):
    assert load(source).answer() == 42 == load(source).answer()
    assert len(builds) == 1
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".sha256", ".so"]
    assert cache.stat().st_mode & 0o077 == 0


def test_a_build_of_another_cpu_compiler_source_or_with_other_flags_is_not_loaded(cache, source, builds, monkeypatch):
    load(source)
    monkeypatch.setattr(build, "cpu_type", lambda: "another CPU")
    load(source)
    assert len(builds) == 2
    load(source, "-O2")
    source.write_text(SOURCE.replace("42", "43"))
    assert load(source).answer() == 43
    monkeypatch.setenv("CXX", "g++" if "g++" not in builds[0][0] else "clang++")
    load(source)
    assert len(builds) in (4, 5) and len(list(cache.glob("*.so"))) == len(builds)  # 4 where there is one compiler


def test_the_cpu_type_names_its_instructions():
    assert "flags" in build.cpu_type() or "Features" in build.cpu_type() or build.platform.system() != "Linux"


@pytest.mark.parametrize("harm", ["cut", "changed", "no hash", "a foreign hash"])
def test_a_library_that_is_not_as_it_was_built_is_built_again(cache, source, builds, harm):
    load(source)
    library, digest = next(cache.glob("*.so")), next(cache.glob("*.sha256"))
    content = bytearray(library.read_bytes())
    library.unlink()  # what is changed in place changes under this process, too, which has it loaded
    if harm == "changed":
        content[len(content) // 2] ^= 1
    library.write_bytes(content[:5000] if harm == "cut" else content)
    if harm == "no hash":
        digest.unlink()
    elif harm == "a foreign hash":
        digest.write_text("0" * 64)
    assert load(source).answer() == 42
    assert len(builds) == 2 and load(source) is not None and len(builds) == 2


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_cache_folder_that_others_can_write_is_not_used(cache, source, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert load(source).answer() == 42
    assert not list(cache.iterdir())


def test_without_a_compiler_one_line_names_the_package_and_the_gain(cache, source, monkeypatch, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with caplog.at_level("INFO", "hornet"):
        assert load(source) is None
    message, = caplog.messages
    assert "g++" in message and "twice" in message


def test_without_jpeglib_one_line_names_the_package_and_the_gain(cache, source, caplog):
    source.write_text('#include <not_there/jpeglib.h>\n')
    with caplog.at_level("INFO", "hornet"):
        assert load(source) is None
    message, = caplog.messages
    assert "libjpeg-dev" in message and "twice" in message


def test_a_source_that_does_not_compile_is_one_line_and_leaves_nothing(cache, source, caplog):
    source.write_text("nonsense\nand more")
    with caplog.at_level("INFO", "hornet"):
        assert load(source) is None
    assert len(caplog.messages) == 1 and "nonsense" in caplog.messages[0]
    assert {p.suffix for p in cache.iterdir()} == {".lock"}
