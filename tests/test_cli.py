"""The command line as a person meets it: real processes, exit codes, one sentence."""
import subprocess
import sys

import pytest

from tests.kits.docs import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "main.py").exists(), reason="main.py is not there yet")


def main(*argv, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *argv], cwd=cwd, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.parametrize("argv, words", [
    (["--model", "hornet_tiny_7x7", "--clip_grad", "5--batch_size", "128"], "stray backslash"),
    (["--model", "hornet_tny_7x7", "--data_path", "/nowhere"], "did you mean hornet_tiny_7x7?"),
])
def test_a_typing_error_is_one_line_and_exit_code_2(argv, words):
    ended = main(*argv)
    assert ended.returncode == 2
    assert words in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and ended.stdout == ""


def test_help_ends_with_0():
    ended = main("--help")
    assert ended.returncode == 0 and "--data_path" in ended.stdout and "--help all" in ended.stdout


def test_print_config_needs_no_data_and_leaves_nothing(tmp_path):
    ended = main("--config", str(ROOT / "recipes/hornet_base_gf.yaml"), "--lr", "1e-3", "--print_config", "true",
                 "--output_dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "published: 0.004" in ended.stdout and "recipe" in ended.stdout
    assert list(tmp_path.iterdir()) == []
