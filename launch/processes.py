"""The life and end of processes on this machine."""
import os
import signal
import threading
import time

GRACE_WITHOUT_LAUNCHER = 15.0


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended but wasn't collected by its parent doesn't."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_with_launcher() -> None:
    """End this process when the process that started it is gone (torchrun killed, srun's step torn down).

    A thread asks for the parent's id once a second. It first sends this process SIGTERM, so that a training run
    can save at its next update boundary, and ends it after 15 seconds. (PR_SET_PDEATHSIG would not do: it fires
    when the parent's *thread* ends.)
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_WITHOUT_LAUNCHER)
        end_now(1)

    threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()


def end_now(code: int) -> None:
    """End this process at once, with its loader workers, without waiting for threads or collectives."""
    # The main thread may be about to fork a loader worker, which would be missed below: it waits for the end instead.
    os.register_at_fork(before=lambda: time.sleep(3600))
    children = f"/proc/self/task/{os.getpid()}/children"
    try:
        with open(children) as file:
            pids = [int(pid) for pid in file.read().split()]
    except OSError:
        pids = []
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os._exit(code)
