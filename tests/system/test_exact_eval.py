"""Evaluation counts each image once on any number of ranks, as by hand."""
import pytest
import torch

from engine import Evaluation, evaluate
from tests.kits.processes import in_processes
from tests.kits.toy import Alone, Toy, batch

COUNTS, BAD = (23, 2), (3, 11)  # images of an evaluation, and those that cannot be read


def prepare(b):
    return b.images, torch.where((b.indices == BAD[0]) | (b.indices == BAD[1]), -100, b.targets)


def score(process, counts=COUNTS, expected=0):
    """Of two networks, for each number of images; with 2 of them on three ranks one has none."""
    found = []
    for count in counts:
        own = range(process.rank, count, process.world_size)
        batches = [batch(own[i:i + 4], [-1] * len(own[i:i + 4])) for i in range(0, len(own), 4)]
        found.append(evaluate([("a", Toy(1)), ("b", Toy(2))], batches, Evaluation(
            prepare, torch.device("cpu"), outputs=True, process=process, expected=expected or count)))
    return found


@torch.no_grad()
def by_hand(seed, count):
    """(hits1, hits5, losses of the images that can be read)."""
    images, targets = prepare(batch(range(count), [-1] * count))
    logits = Toy(seed).eval()(images)
    best, readable = logits.argsort(1, descending=True), targets >= 0
    return ((best[:, 0] == targets).sum(), (best[:, :5] == targets[:, None]).sum(),
            torch.nn.functional.cross_entropy(logits[readable].double(), targets[readable], reduction="none"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_counts_are_those_by_hand_on_any_number_of_ranks_even_without_images(tmp_path, world_size):
    for found in [score(Alone())] if world_size == 1 else in_processes(score, world_size, tmp_path):
        for count, results in zip(COUNTS, found):
            for seed, result in enumerate(results, start=1):
                hits1, hits5, losses = by_hand(seed, count)
                assert (result.hits1, result.hits5, result.images, result.bad) == (hits1, hits5, count, count - len(losses))
                assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)
                assert result.outputs.nll.sum() == pytest.approx(losses.sum().item(), rel=1e-6)
                assert result.acc1 == pytest.approx(100 * hits1 / count)
                assert list(result.outputs.indices) == list(range(count)) and result.outputs.probabilities.shape == (count, 5)
                assert (result.outputs.top[:, 0] == result.outputs.targets).sum() == hits1


def test_a_missing_image_is_an_error():
    with pytest.raises(RuntimeError, match="23 .* 24"):
        score(Alone(), expected=24)
