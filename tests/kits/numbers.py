"""A training with plain operators, and what stands in tests/data/parity/same_numbers.json about it: a hash of
each global batch, loss and gradient norm of each update; the rest is read from the run folder."""
import hashlib
import json
import tempfile
from pathlib import Path

import torch

from tests.kits.processes import codes
from tests.kits.runs import result, start


def train(argv: list[str], work: Path, world_size: int = 1,
          stop_after: int | None = None) -> tuple[list[int], list[dict]]:
    """Run main.py with plain operators and one thread per rank; SIGUSR1 reaches rank 0 in update
    `stop_after`.

    Returns the ranks' exit codes and the updates, each with the mean `loss`, the `grad_norm` and the sha256
    `batch` of the global batch: images as the network gets them, targets and erased boxes in order of
    position.
    """
    seen, rows, updates = Path(tempfile.mkdtemp(dir=work)), {}, {}
    at = [] if stop_after is None else [{"phase": "step", "update": stop_after, "do": "SIGUSR1"}]
    (seen / "batches").mkdir()
    ranks = start(argv, seen / "console", world_size, at=at, native="0", batches=str(seen / "batches"), losses=str(seen))
    ended = codes(ranks)
    (work / "console").write_text(ranks[0].text())
    for path in (seen / "batches").iterdir():
        for update, position, digest in map(str.split, path.read_text().splitlines()):
            rows.setdefault(int(update), []).append((int(position), digest))
    for path in seen.glob("losses-*"):
        for line in map(json.loads, path.read_text().splitlines()):
            updates.setdefault(line["update"], []).append(line)
    return ended, [
        {"update": update, "loss": sum(part["loss"] for part in parts) / world_size, "grad_norm": parts[0]["grad_norm"],
         "batch": hashlib.sha256("".join(digest for _, digest in sorted(rows[update])).encode()).hexdigest()}
        for update, parts in sorted(updates.items())]


def console(work: Path) -> str:
    """What rank 0 printed in the last training."""
    return (work / "console").read_text()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer tensors of the last epoch's checkpoint in a run folder."""
    state = result(folder)
    found = {f"{part}/{name}": value for part in ("model", "model_ema")
             for name, value in (state[part] or {}).items()}
    return found | {f"optimizer/{index}/{name}": value
                    for index, slots in sorted(state["optimizer"]["state"].items())
                    for name, value in slots.items() if isinstance(value, torch.Tensor)}
