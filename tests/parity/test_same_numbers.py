"""A training gives the numbers it gave when they were stored: every global batch to the bit, losses,
gradients, tensors.

`python -m tests.parity.store_same_numbers` stores them again (only when they are meant to change, with the
reason in the commit); with `--bits` it prints what the rows end with to the bit, for comparing two commits on
one machine.
"""
import pytest

from tests.kits.images import write_images
from tests.parity import store_same_numbers as store

STORED = store.read()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "data", store.TRAIN, store.VAL)


def assert_same(found: dict, stored: dict, *, exact: bool) -> None:
    """Batches equal to the bit; losses and gradient norms to 1e-5 and tensor norms to 1e-3, or (not `exact`,
    bf16) losses and gradient norms to 1e-2 alone."""
    close = dict(rel=1e-5) if exact else dict(rel=1e-2)
    assert found["update"] == stored["update"]
    differing = [update for update, a, b in zip(stored["update"], found["batch"], stored["batch"]) if a != b]
    assert not differing, (f"global batches of updates {differing} differ; the stored ones were made with "
                           f"{STORED['versions']}, these with {store.versions()}")
    assert found["loss"] == pytest.approx(stored["loss"], **close)
    assert found["grad_norm"] == pytest.approx(stored["grad_norm"], **close)
    for line, expected in zip(found["log"], stored["log"], strict=True):
        assert line == pytest.approx(expected, **close)
    assert found["norms"].keys() == stored["norms"].keys()
    if exact:
        differing = {name: (norm, stored["norms"][name]) for name, norm in found["norms"].items()
                     if norm != pytest.approx(stored["norms"][name], rel=1e-3)}
        assert not differing


@pytest.mark.parametrize("name, stop_after", [*((name, None) for name in store.ROWS), *store.RESUMED])
def test_a_training_gives_the_stored_numbers_also_when_it_is_resumed_within_an_epoch(name, stop_after, images, tmp_path):
    """What a resumed run gives is compared with the figures of the undisturbed one."""
    found = store.figures(store.run(name, images, tmp_path / "work", stop_after))
    assert_same(found, STORED["rows"][name], exact="bf16" not in name)
