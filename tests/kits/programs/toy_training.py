"""A small training loop under the launch package: one shared scalar, updates of 20 ms, state saved on a stop.

    toy_training.py FOLDER UPDATES [key=value …]
Faults: sleep=RANK@UPDATE:PHASE, raise=RANK@UPDATE, user_error=RANK@UPDATE, hang_timeout=SECONDS,
pace=SECONDS. Writes FOLDER/state.json (update, value), and FOLDER/pids/RANK.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError
from common.ledger import Ledger
from common.log import setup_logging
from common.outcome import ExitCode, Outcome
from launch.process import start
from launch.stop import StopRequest
from launch.watchdog import Watchdog


def fault(given: dict, kind: str, rank: int, update: int, phase: str = "data") -> bool:
    where, _, wanted = given.get(kind, "").partition(":")
    return where == f"{rank}@{update}" and (wanted or "data") == phase


def train(process, watchdog, stop, folder: Path, updates: int, given: dict) -> int:
    state_file = folder / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"update": 0, "value": 0.0}
    state = process.broadcast_object(state)
    ledger = Ledger(folder)
    if process.is_main:
        ledger.begin(update=state["update"])
    for update in range(state["update"], updates):
        for phase in ("data", "forward", "backward"):
            watchdog.phase(phase, update)
            time.sleep(float(given.get("pace", 0.02)) / 3)
            if fault(given, "sleep", process.rank, update, phase):
                time.sleep(1000)
        if fault(given, "raise", process.rank, update):
            raise ArithmeticError("one divided by nothing")
        if fault(given, "user_error", process.rank, update):
            raise UserError("the value 7 is not accepted: use 8.")
        total = process.all_reduce_(torch.tensor([float(update + process.rank)], dtype=torch.float64))
        state = {"update": update + 1, "value": state["value"] * 0.9 + total.item()}
        if process.is_main:
            (folder / "now").write_text(str(update))
        if stop.agreed(process):
            watchdog.phase("saving", update)
            if process.is_main:
                state_file.write_text(json.dumps(state))
                ledger.end(Outcome.PAUSED, update=update + 1, cause=stop.reason)
            (folder / f"stopped{process.rank}").write_text(str(update + 1))
            return ExitCode.PAUSED
    if process.is_main:
        state_file.write_text(json.dumps(state))
        ledger.end(Outcome.DONE, update=updates)
    return ExitCode.DONE


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
