"""A small training loop under the launch package: one shared scalar, updates of 20 ms, state saved on a stop.

    toy_training.py FOLDER UPDATES [key=value …]
Faults: sleep=RANK@UPDATE:data, raise=RANK@UPDATE, user_error=RANK@UPDATE, hang_timeout=SECONDS, pace=SECONDS.
Writes FOLDER/state.json (update, value), FOLDER/now (update) and FOLDER/pids/RANK.
"""
import os
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError
from common.files import read_json, write_json
from common.ledger import Ledger
from common.log import setup_logging
from common.outcome import ExitCode, Outcome
from launch.process import start
from launch.stop import StopRequest
from launch.watchdog import Watchdog


def fail(here: str, given: dict) -> None:
    """The fault for the moment RANK@UPDATE, if one is given."""
    if given.get("sleep") == f"{here}:data":
        time.sleep(1000)
    if given.get("raise") == here:
        raise ArithmeticError("one divided by nothing")
    if given.get("user_error") == here:
        raise UserError("the value 7 is not accepted: use 8.")


def train(process, watchdog, stop, folder: Path, updates: int, given: dict) -> int:
    state_file, ledger = folder / "state.json", Ledger(folder)
    state = read_json(state_file) if state_file.exists() else {"update": 0, "value": 0.0}
    state = process.broadcast_object(state)
    if process.is_main:
        ledger.begin(update=state["update"])
    stopped = False
    while state["update"] < updates and not stopped:
        update = state["update"]
        for phase in ("data", "forward", "backward"):
            watchdog.phase(phase, update)
            time.sleep(float(given.get("pace", 0.02)) / 3)
            if phase == "data":
                fail(f"{process.rank}@{update}", given)
        total = process.all_reduce_(torch.tensor([float(update + process.rank)], dtype=torch.float64))
        state = {"update": update + 1, "value": state["value"] * 0.9 + total.item()}
        if process.is_main:
            (folder / "now").write_text(str(update))
        stopped = stop.agreed(process)
    if process.is_main:
        write_json(state_file, state)
        ledger.end(Outcome.PAUSED if stopped else Outcome.DONE, update=state["update"], cause=stop.reason)
    return ExitCode.PAUSED if stopped else ExitCode.DONE


def main(argv: list[str]) -> int:
    folder, updates = Path(argv[0]), int(argv[1])
    given = dict(argument.split("=", 1) for argument in argv[2:])
    (folder / "pids").mkdir(parents=True, exist_ok=True)
    with start("cpu", 30) as process:
        setup_logging(process.rank)
        (folder / "pids" / str(process.rank)).write_text(str(os.getpid()))
        with StopRequest() as stop, Watchdog(process, float(given.get("hang_timeout", 60))) as watchdog:
            watchdog.record_in(str(folder))
            return train(process, watchdog, stop, folder, updates, given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
