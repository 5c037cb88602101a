"""main.py with a disturbance at one moment of one rank, told as JSON in the first argument:

    hooked_main.py '{"at": [{"rank": 1, "phase": "data", "update": 7, "do": "SIGKILL"}]}' <options of main.py>

`do` is a signal for the process itself, "raise", or "infinite_input"/"infinite_loss" for the update's forward
pass. "now": FOLDER keeps the last "phase update pid" of each rank in FOLDER/now-RANK; "states": FOLDER keeps
the weights and their average after each update in FOLDER/RANK-UPDATE.pth; "batches": FOLDER appends a line
"update position hash" for each image as the network gets it. "brake": FILE makes updates slow while it exists.
"""
import hashlib
import importlib
import json
import os
import signal
import sys
import time

import torch


def hooked(base: type, hook: dict) -> type:
    """The trainer `base`, disturbed as `hook` says."""

    class Hooked(base):
        def on_phase(self, phase: str, update: int) -> None:
            super().on_phase(phase, update)
            self.update_under_way = update
            if phase == "data" and os.path.exists(hook.get("brake", "")):
                time.sleep(0.4)
            if "now" in hook:
                with open(os.path.join(hook["now"], f"now-{self.process.rank}"), "w") as file:
                    file.write(f"{phase} {update} {os.getpid()}\n")
            for entry in hook.get("at", []):
                if (entry.get("rank", 0), entry["phase"], entry["update"]) == (self.process.rank, phase,
                                                                               update):
                    _do(self, entry["do"])

        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            if "batches" in hook:
                _note_batches(self, hook["batches"])

        def after_update(self, update: int, stats, sums) -> bool:
            if "states" in hook:
                state = self.state_dict()
                parts = {"model": state["model"], "model_ema": state["model_ema"],
                         "optimizer": state["optimizer"]["state"], "finite": bool(stats.finite)}
                torch.save(parts, os.path.join(hook["states"], f"{self.process.rank}-{update}.pth"))
            return super().after_update(update, stats, sums)

    return Hooked


def _note_batches(trainer, folder: str) -> None:
    prepare = trainer.task.prepare

    def noted(batch):
        images, targets = prepare(batch)
        with open(os.path.join(folder, str(os.getpid())), "a") as file:
            for position, image, target in zip(batch.positions.tolist(), images, targets):
                digest = hashlib.sha256(image.numpy().tobytes() + target.numpy().tobytes()).hexdigest()
                file.write(f"{trainer.update_under_way} {position} {digest}\n")
        return images, targets

    trainer.task.prepare = noted


def _do(disturbed, what: str) -> None:
    if what == "raise":
        raise ArithmeticError("one divided by nothing")
    if what in ("infinite_input", "infinite_loss"):
        _poison(disturbed, what)
    else:
        if what == "SIGSTOP":
            time.sleep(2.5)  # a heartbeat a second names the phase: this one first, then silence
        os.kill(os.getpid(), getattr(signal, what))


def _poison(disturbed, what: str) -> None:
    """Spoil the micro-batches of the update under way from here on, also where they are replayed, and no
    others."""
    task, bad = disturbed.task, disturbed.update_under_way
    prepare, criterion = task.prepare, task.criterion

    def spoiled(batch):
        images, targets = prepare(batch)
        if disturbed.update_under_way == bad:
            images[0] = float("inf")
        return images, targets

    def infinite(logits, targets):
        return criterion(logits, targets) + (float("inf") if disturbed.update_under_way == bad else 0)

    if what == "infinite_input":
        task.prepare = spoiled
    else:
        task.criterion = infinite


def run(argv: list[str], hook: dict) -> int:
    """main.main(argv), or "program": a module's run(argv), under `hook`; the exit code."""
    import main
    import training

    training.Trainer = hooked(training.Trainer, hook)
    program = hook.get("program")
    return importlib.import_module(program).run(argv) if program else main.main(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], json.loads(sys.argv[1])))
