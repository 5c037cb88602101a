"""The few places where tests/parity/test_same_numbers.py touches the program.

A training is started through `main.main(argv)`, in one child process per rank. Two methods are wrapped there
for as long as that child lives: `datasets.device.TrainPrepare.__call__(batch) → (images, targets)` shows each
prepared micro-batch, `optim.update.Update.step(update) → .loss, .grad_norm` each update. The rest is read
from the run folder: checkpoint-N.pth (entries model, model_ema, optimizer) and log.txt.
"""
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import torch

from tests.kits.processes import Child, codes, environment, places
from tests.kits.runs import result


def train(argv: list[str], work: Path, world_size: int = 1,
          stop_after: int | None = None) -> tuple[list[int], list[dict]]:
    """Run main.py with plain operators and one thread per rank; SIGUSR1 reaches rank 0 in update
    `stop_after`.

    Returns the ranks' exit codes and the updates, each with the mean `loss`, the `grad_norm` and the sha256
    `batch` of the global batch: images as the network gets them, targets and erased boxes in order of
    position.
    """
    ranks = []
    for rank, place in enumerate(places(world_size) if world_size > 1 else [{}]):
        # No compiler on the path: plain operators, Pillow's decoder.
        variables = environment(**place, PATH="/nonexistent", CXX="")
        (work / f"rank{rank}.txt").unlink(missing_ok=True)
        ranks.append(Child(_train, (argv, work / f"rank{rank}.json", stop_after if rank == 0 else None),
                           variables, work / f"rank{rank}.txt"))
    ended = codes(ranks)
    seen = [json.loads(path.read_text()) if path.exists() else [] for path in
            (work / f"rank{rank}.json" for rank in range(world_size))]
    return ended, [_merged(parts) for parts in zip(*seen)]


def console(work: Path) -> str:
    """What rank 0 printed in the last training."""
    return (work / "rank0.txt").read_text()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer tensors of the last epoch's checkpoint in a run folder."""
    state = result(folder)
    found = {f"{part}/{name}": value for part in ("model", "model_ema")
             for name, value in (state[part] or {}).items()}
    return found | {f"optimizer/{index}/{name}": value
                    for index, slots in sorted(state["optimizer"]["state"].items())
                    for name, value in slots.items() if isinstance(value, torch.Tensor)}


def _merged(parts: tuple[dict, ...]) -> dict:
    rows = {int(position): digest for part in parts for position, digest in part["rows"].items()}
    joined = "".join(digest for _, digest in sorted(rows.items()))
    return {"update": parts[0]["update"], "batch": hashlib.sha256(joined.encode()).hexdigest(),
            "loss": sum(part["loss"] for part in parts) / len(parts), "grad_norm": parts[0]["grad_norm"]}


def _train(argv: list[str], output: Path, stop_after: int | None) -> int:
    torch.backends.mkldnn.is_available = lambda: False  # plain operators on AMD CPUs too
    seen = _record(stop_after)
    import main
    code = main.main(argv)
    output.write_text(json.dumps(seen))
    return code


def _record(stop_after: int | None) -> list[dict]:
    """A list that fills with this rank's updates while it trains."""
    from datasets.device import TrainPrepare
    from optim.update import Update

    seen: list[dict] = []
    rows: dict[int, str] = {}
    prepare, step = TrainPrepare.__call__, Update.step

    def prepared(self, batch):
        images, targets = prepare(self, batch)
        for row, position in enumerate(batch.positions.tolist()):
            parts = (images[row].permute(1, 2, 0), targets[row], batch.boxes[row])
            rows[position] = hashlib.sha256(b"".join(
                np.ascontiguousarray(part.numpy()).tobytes() for part in parts)).hexdigest()
        return images, targets

    def stepped(self, update):
        stats = step(self, update)
        seen.append({"update": update, "loss": stats.loss.item(), "grad_norm": stats.grad_norm.item(),
                     "rows": dict(rows)})
        rows.clear()
        if update == stop_after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return stats

    TrainPrepare.__call__, Update.step = prepared, stepped
    return seen
