"""Networks scored on a few pictures: weights that do not fit the data are told before hours are spent."""
from copy import copy
from dataclasses import replace
from typing import Any

import torch

import engine
from datasets.build import Data
from datasets.dataset import make_loader
from datasets.sampler import spread_over_classes
from datasets.transforms import eval_transform
from run.preflight import ENOUGH_CLASSES, low_score

SAMPLED = 500


def score_pictures(networks: list[tuple[str, torch.nn.Module]], data: Data, options: Any, evaluation: engine.Evaluation,
                   count: int) -> list[engine.EvalResult]:
    """Score (name, network) pairs on `count` pictures spread over the classes: validation ones, else training ones.

    Every rank must call it and gets the same results; unreadable pictures count as `bad`.
    """
    source, process = data.val, evaluation.process
    if source is None:
        source = copy(data.train)
        source.transform = eval_transform(options.input_size, options.crop_pct)
    chosen = spread_over_classes(source.targets, count)[process.rank::process.world_size].tolist()
    size = max(1, int(1.5 * options.batch_size))
    batches = [chosen[first:first + size] for first in range(0, len(chosen), size)]
    workers = max(0, min(options.num_workers, len(batches) - 1))
    loader = make_loader(source, replace(options, num_workers=workers), batches)
    try:
        return engine.evaluate(networks, loader, replace(evaluation, expected=None, outputs=False))
    finally:
        loader.close()


def strange_weights(network: torch.nn.Module, weights: str, data: Data, options: Any,
                    evaluation: engine.Evaluation) -> str | None:
    """A sentence when loaded weights fail on 500 pictures, as they do with classes in another order; else None.

    For 100 classes and more, where chance is at most 1 %. Every rank must call it; the answer is the same on all.
    """
    if data.num_classes < ENOUGH_CLASSES:
        return None
    found = score_pictures([(weights, network)], data, options, evaluation, SAMPLED)[0]
    return low_score(found.hits1, found.images - found.bad, data.num_classes, weights)
