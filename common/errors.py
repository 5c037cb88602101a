"""The exceptions that are a sentence for the person at the terminal."""
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from common.outcome import ExitCode


class UserError(ValueError):
    """What the user can fix: one sentence with the value, what is accepted and the fix.

    `code` names the kind of mistake (`unknown_flag`, `unreadable_image`) for tests and scripts, because the
    sentence may change. `exit_code` is that of the program.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, sentence: str, code: str = "usage"):
        super().__init__(sentence)
        self.code = code


class Failure(UserError):
    """What no change of the command line fixes and what may pass: a peer that did not arrive, a lost disk.

    A scheduler may start such a run again; another UserError would only be repeated.
    """

    exit_code = ExitCode.FAILED


# A file system that does not answer may answer again.
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV)


def kind_of(error: Exception) -> type[UserError]:
    """Failure for an error of a file system that may pass, else UserError."""
    return Failure if isinstance(error, OSError) and error.errno in MAY_PASS else UserError


# What a machine lacks: code, words of the errors in which Python and PyTorch report it, sentence. First wins.
_LACKS = (
    ("open_files", ("Too many open files", "items of ancdata"),
     "too few file descriptors: raise the limit (ulimit -n 4096) or lower --num_workers"),
    ("processes", ("can't start new thread", "Resource temporarily unavailable"),
     "no more threads or processes are allowed: raise the limit (ulimit -u) or lower --num_workers"),
    ("shared_memory", ("unable to allocate shared memory", "shared memory object", "</torch_", "Bus error"),
     "/dev/shm is full or too small: enlarge it (docker run --shm-size=8g) or lower --num_workers"),
    ("disk_full", ("No space left on device", "Disk quota exceeded"),
     "the disk of --output_dir, of temporary files or /dev/shm is full: free some space"),
    ("loader_killed", ("DataLoader worker (pid",),
     "a loader process was killed, mostly for lack of memory: lower --num_workers or free memory"),
    ("device_memory", ("CUDA out of memory", "XPU out of memory", "MPS backend out of memory"),
     "the device has too little memory: lower --batch_size, with a higher --update_freq"),
    ("memory", ("can't allocate memory", "Cannot allocate memory", "MemoryError"),
     "the machine has too little memory: lower --batch_size or --num_workers"),)


@contextmanager
def lacks_in_words() -> Iterator[None]:
    """Raise Failure with a sentence for an exception that only means that the machine lacks something."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        for code, words, sentence in _LACKS:
            found = [line for line in text.splitlines() if any(word in line for word in words)]
            if found:
                raise Failure(f"{sentence}; a training is resumed by the same command "
                              f"({found[-1].strip()[:120]}).", code=code) from error
        raise
