"""main.py with a disturbance at one moment of one rank, told as JSON in the first argument:

    hooked_main.py '{"at": [{"rank": 1, "phase": "data", "update": 7, "do": "SIGKILL"}]}' <options of main.py>

`do` is a signal for the process itself, "raise", or "infinite_input"/"infinite_loss" for the update's forward
pass. "now": FOLDER keeps the last "phase update pid" of each rank in FOLDER/now-RANK; "losses": FOLDER
appends loss and gradient norm of each update to FOLDER/losses-RANK; "batches": FOLDER appends a line "update
position hash" to FOLDER/PID for each image as the network gets it, its target and the boxes erased from it.
"brake": FILE makes updates slow while it exists; "native": "0" takes plain operators.
"""
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def hooked(base: type, hook: dict) -> type:
    """The trainer `base`, disturbed as `hook` says."""
    folders = {name: Path(hook[name]) for name in ("now", "losses", "batches", "brake") if name in hook}

    class Hooked(base):
        def on_phase(self, phase: str, update: int) -> None:
            super().on_phase(phase, update)
            self.update_under_way = update
            if phase == "data" and "brake" in folders and folders["brake"].exists():
                time.sleep(0.4)
            if "now" in folders:
                (folders["now"] / f"now-{self.process.rank}").write_text(f"{phase} {update} {os.getpid()}\n")
            for entry in hook.get("at", []):
                if (entry.get("rank", 0), entry["phase"], entry["update"]) == (self.process.rank, phase, update):
                    _do(self, entry["do"])

        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            if "batches" in folders:
                _note_batches(self, folders["batches"] / str(os.getpid()))

        def after_update(self, update: int, stats, sums) -> bool:
            if "losses" in folders:
                with open(folders["losses"] / f"losses-{self.process.rank}", "a") as file:
                    file.write(json.dumps({"update": update, "loss": stats.loss.item(),
                                           "grad_norm": stats.grad_norm.item()}) + "\n")
            return super().after_update(update, stats, sums)

    return Hooked


def _note_batches(trainer, path: Path) -> None:
    prepare = trainer.task.prepare

    def noted(batch):
        images, targets = prepare(batch)
        with open(path, "a") as file:
            for row, position in enumerate(batch.positions.tolist()):
                parts = (images[row].permute(1, 2, 0), targets[row], batch.boxes[row])
                digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
                file.write(f"{trainer.update_under_way} {position} {digest}\n")
        return images, targets

    trainer.task.prepare = noted


def _do(disturbed, what: str) -> None:
    if what == "raise":
        raise ArithmeticError("one divided by nothing")
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    else:
        _poison(disturbed, what)


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

    os.environ.setdefault("HORNET_NATIVE", hook.get("native", "1"))
    training.Trainer = hooked(training.Trainer, hook)
    program = hook.get("program")
    return importlib.import_module(program).run(argv) if program else main.main(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], json.loads(sys.argv[1])))
