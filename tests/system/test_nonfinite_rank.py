"""A real run of two processes, one of which meets a loss that is not finite: the update changes nothing on
either."""
import json

import pytest
import torch

from tests.kits.processes import codes
from tests.kits.runs import UPDATES, arguments, assert_equal_bits, result, start


@pytest.mark.parametrize("what", ["infinite_input", pytest.param("infinite_loss", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_both(images, tmp_path, what):
    folder, bad = tmp_path / "run", UPDATES + 2
    at = dict(rank=1, phase="forward", update=bad, do=what)
    argv = arguments(images, folder, epochs=2, batch_size=2, update_freq=2)
    ranks = start(argv, tmp_path / "console", 2, at=[at], states=str(tmp_path))
    assert codes(ranks) == [0, 0], ranks[0].text()
    states = {(rank, update): torch.load(tmp_path / f"{rank}-{update}.pth", weights_only=True)
              for rank in (0, 1) for update in (bad - 1, bad, bad + 1)}
    for rank in (0, 1):
        assert [states[rank, bad + i].pop("finite") for i in (-1, 0, 1)] == [True, False, True]
        assert_equal_bits(states[rank, bad - 1], states[rank, bad])
        with pytest.raises(AssertionError, match="model"):
            assert_equal_bits(states[rank, bad], states[rank, bad + 1])
    assert_equal_bits(states[0, bad + 1], states[1, bad + 1])
    assert result(folder)["log"][1]["nonfinite_updates"] == 1
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["kind"] == "nonfinite"]
    # The file, which rank 0 writes, has the images and the module of the rank that met it.
    assert (event["update"], event["rank"], event["reproduced"], len(event["images"])) == (bad, 1, True, 4)
    assert bool(event["first_module"]) == (what == "infinite_input")
    assert "Update" not in ranks[1].text() and ranks[0].text().count(f"Update {bad} was not applied") == 1
