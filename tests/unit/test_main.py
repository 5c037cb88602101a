"""The command line as a person meets it: exit codes, one sentence, and what a machine lacks in words."""
import resource
import subprocess
import sys

import pytest

import main
from common.errors import Failure, UserError, lacks_in_words
from tests.kits.docs import ROOT


@pytest.mark.parametrize("rank, expected", [("x", True), ("-1", True), ("1.5", True), ("", True), ("1", False)])
def test_a_typing_error_is_one_sentence_and_exit_code_2_which_rank_0_leaves(rank, expected, monkeypatch, capfd):
    monkeypatch.setenv("RANK", rank)
    assert main.main(["--bach_size", "3"]) == 2
    shown = capfd.readouterr()
    assert ("--batch_size?" in shown.err, len(shown.err.splitlines()), shown.out) == (expected, int(expected), "")


def test_print_config_needs_no_data_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes/hornet_base_gf.yaml")
    assert main.main(["--config", recipe, "--lr", "1e-3", "--print_config", "true", "--output_dir", "run"]) == 0
    assert "published: 0.004" in capfd.readouterr().out and list(tmp_path.iterdir()) == []


def test_too_few_file_descriptors_are_one_sentence(tmp_path):
    argv = "main.py --config recipes/quickstart.yaml --num_workers 2 --output_dir".split()
    ended = subprocess.run([sys.executable, *argv, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, timeout=120,
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert all(words in last for words in ("--num_workers 2", "32", "ulimit -n", "--num_workers 0"))


@pytest.mark.parametrize("code, error", [
    ("open_files", OSError("Caught OSError in DataLoader worker process 0.\n...\nOSError: [Errno 24] Too many open files")),
    ("open_files", RuntimeError("received 0 items of ancdata")),
    ("processes", RuntimeError("can't start new thread")),
    ("processes", BlockingIOError(11, "Resource temporarily unavailable")),
    ("shared_memory", RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)")),
    ("shared_memory", RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)")),
    ("shared_memory", RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that")),
    ("disk_full", OSError(28, "No space left on device")),
    ("loader_killed", RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")),
    ("loader_killed", RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly")),
    ("device_memory", RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ("memory", RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")),
    ("memory", MemoryError())])
def test_what_a_machine_lacks_is_one_sentence(code, error):
    with pytest.raises(Failure) as caught, lacks_in_words():
        raise error
    assert caught.value.code == code and caught.value.exit_code == 1
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("error", [UserError("no", code="x"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_other_exceptions_pass(error):
    with pytest.raises(type(error)) as caught, lacks_in_words():
        raise error
    assert caught.value is error
