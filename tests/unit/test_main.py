"""The command line as a person meets it: exit codes, one sentence, and what a machine lacks in words."""
import errno
import resource
import subprocess
import sys

import pytest

import main
from common.errors import Failure, UserError, lacks_in_words
from tests.kits.docs import ROOT


def start(*argv, cwd=ROOT, limit=None):
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *argv], cwd=cwd, capture_output=True,
                          text=True, timeout=120, preexec_fn=limit)


def refused(ended, code, *named):
    """One sentence on standard error, nothing else, and the exit code."""
    assert ended.returncode == code, ended
    assert all(word in ended.stderr for word in named) and "Traceback" not in ended.stderr, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1 and ended.stdout == ""


def test_a_typing_error_is_one_line_and_exit_code_2_before_pytorch_is_imported():
    refused(start("--model", "hornet_tiny_7x7", "--clip_grad", "5--batch_size", "128"), 2, "5--batch_size")


def test_an_unknown_model_is_one_line_and_exit_code_2():
    refused(start("--model", "hornet_tny_7x7", "--data_path", "/nowhere"), 2, "hornet_tiny_7x7?")


@pytest.mark.parametrize("rank", ["x", "-1", "1.5", ""])
def test_a_rank_that_is_no_number_is_one_sentence(rank, monkeypatch, capfd):
    monkeypatch.setenv("RANK", rank)
    assert main.main(["--bach_size", "3"]) == 2
    assert "--batch_size?" in capfd.readouterr().err


def test_ranks_other_than_0_leave_the_sentence_to_rank_0(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert main.main(["--bach_size", "3"]) == 2
    assert capfd.readouterr().err == ""


def test_help_and_print_config_need_no_data_and_leave_nothing(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0 and "--data_path" in capfd.readouterr().out
    ended = start("--config", str(ROOT / "recipes/hornet_base_gf.yaml"), "--lr", "1e-3", "--print_config",
                  "true", "--output_dir", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "published: 0.004" in ended.stdout and "recipe" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_too_few_file_descriptors_are_one_sentence(tmp_path):
    argv = "--config recipes/quickstart.yaml --num_workers 2 --output_dir".split()
    ended = start(*argv, str(tmp_path / "run"),
                  limit=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert all(words in last for words in ("--num_workers 2", "32", "ulimit -n", "--num_workers 0"))


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize("error, code", [
    (OSError(errno.EMFILE, "Too many open files"), "open_files"),
    (OSError("Caught OSError in DataLoader worker process 0.\n...\nOSError: [Errno 24] Too many open "
             "files"), "open_files"),
    (RuntimeError("received 0 items of ancdata"), "open_files"),
    (RuntimeError("can't start new thread"), "processes"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "processes"),
    (RuntimeError("unable to write to file </torch_12_34_0>: No space left on device (28)"), "shared_memory"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)"), "shared_memory"),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers " "are out of shared memory."), "shared_memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), "loader_killed"),
    (RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly"), "loader_killed"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "device_memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you "
                  "tried"), "memory"),
    (MemoryError(), "memory")])
def test_what_a_machine_lacks_is_one_sentence(error, code):
    with pytest.raises(Failure) as caught, lacks_in_words():
        raise error
    assert caught.value.code == code and caught.value.exit_code == 1
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("error", [UserError("no", code="x"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_other_exceptions_pass(error):
    with pytest.raises(type(error)) as caught, lacks_in_words():
        raise error
    assert caught.value is error
