"""Evaluation counts each image once on any number of ranks, and what it counts as wrong."""
import numpy as np
import pytest
import torch
from torch import nn

from engine import Evaluation, Observer, evaluate
from tests.kits.processes import in_processes
from tests.kits.toy import CLASSES, Alone, Toy, batch

COUNT = 23


def batches(process, count=COUNT, size=4):
    own = range(process.rank, count, process.world_size)
    return [batch(own[i:i + size], [-1] * len(own[i:i + size])) for i in range(0, len(own), size)]


def prepare(b):
    """Images 3 and 11 cannot be read."""
    unreadable = (b.indices == 3) | (b.indices == 11)
    return b.images, torch.where(unreadable, -100, b.targets)


def score(process, count=COUNT, outputs=True):
    evaluation = Evaluation(prepare, torch.device("cpu"), outputs=outputs, process=process, expected=count)
    return evaluate([("a", Toy(1)), ("b", Toy(2))], batches(process, count), evaluation)


def reference(seed):
    """The same by hand: (hits1, hits5, sum of losses)."""
    images, targets = prepare(batch(range(COUNT), [-1] * COUNT))
    with torch.no_grad():
        logits = Toy(seed).eval()(images)
    best = logits.argsort(1, descending=True)
    nll = -logits.double().log_softmax(1)[torch.arange(COUNT), targets.clamp(min=0)]
    return (int((best[:, 0] == targets).sum()), int((best[:, :5] == targets[:, None]).sum()),
            nll[targets >= 0].sum().item())


def test_counts_by_hand():
    for seed, result in enumerate(score(Alone()), start=1):
        hits1, hits5, loss = reference(seed)
        assert (result.hits1, result.hits5, result.images, result.bad) == (hits1, hits5, COUNT, 2)
        assert result.loss == pytest.approx(loss / (COUNT - 2), rel=1e-6)
        assert result.acc1 == 100 * hits1 / COUNT
        assert list(result.outputs.indices) == list(range(COUNT))
        assert result.outputs.probabilities.shape == (COUNT, 5)
        assert (result.outputs.top[:, 0] == result.outputs.targets).sum() == hits1
        assert result.outputs.nll.sum() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("world_size,count", [(2, COUNT), (3, COUNT), (3, 2)])
def test_any_number_of_ranks_even_without_images(tmp_path, world_size, count):
    alone = score(Alone(), count)
    for results in in_processes(score, world_size, tmp_path, count):
        for one, several in zip(alone, results):
            for count_name in ("hits1", "hits5", "images", "bad"):
                assert getattr(one, count_name) == getattr(several, count_name)
            assert one.loss == pytest.approx(several.loss, rel=1e-6)
            assert np.array_equal(one.outputs.top, several.outputs.top)
            assert np.array_equal(one.outputs.indices, several.outputs.indices)


def test_a_missing_image_is_an_error():
    evaluation = Evaluation(prepare, torch.device("cpu"), expected=COUNT + 1)
    with pytest.raises(RuntimeError, match=f"{COUNT} .* {COUNT + 1}"):
        evaluate([("a", Toy())], batches(Alone()), evaluation)


def test_logits_that_are_no_numbers_count_as_wrong():
    class Broken(nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), CLASSES)
            logits[:, 0] = float("nan")
            return logits

    result, = evaluate([("broken", Broken())], batches(Alone()), Evaluation(prepare, torch.device("cpu")))
    assert (result.hits1, result.hits5, result.nonfinite) == (0, 0, COUNT - 2)


def test_a_subset_of_the_classes():
    evaluation = Evaluation(lambda b: (b.images, torch.where(b.targets == 4, 1, 0)), torch.device("cpu"),
                            columns=[2, 4])
    result, = evaluate([("a", Toy())], batches(Alone()), evaluation)
    images, targets = evaluation.prepare(batch(range(COUNT), [-1] * COUNT))
    assert result.hits1 == int((Toy().eval()(images)[:, [2, 4]].argmax(1) == targets).sum())
    assert result.hits5 == COUNT  # top-2 of two classes


def test_reduced_precision_is_asked_for():
    seen = []

    class Spy(Toy):
        def forward(self, images):
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    for dtype in (None, torch.bfloat16):
        evaluate([("a", Spy())], batches(Alone())[:1],
                 Evaluation(prepare, torch.device("cpu"), autocast_dtype=dtype))
    assert seen == [torch.float32, torch.bfloat16]


def _left(process, count):
    """What an evaluation gives that rank 1 leaves before its second batch, and the batches this rank saw."""
    class Leaver(Observer):
        seen = 0

        def leaves_evaluation(self):
            self.seen += 1
            return process.rank == 1 and self.seen == 2

    observer = Leaver()
    evaluation = Evaluation(prepare, torch.device("cpu"), process=process, expected=count, observer=observer)
    return evaluate([("a", Toy(1))], batches(process, count), evaluation), observer.seen


def test_an_evaluation_that_one_rank_leaves_has_no_result_on_any(tmp_path):
    (first, batches), (second, few) = in_processes(_left, 2, tmp_path, COUNT)
    assert first == second == [] and few == 2 < batches
