"""A real run of two processes, one of which meets a loss that is not finite, while its gradient, which all share, is: it
is not applied on either, and rank 0 records the images of the rank that met it."""
import json

from tests.kits.processes import codes
from tests.kits.runs import UPDATES, arguments, result, start


def test_a_loss_that_is_not_finite_on_one_rank_is_recorded_once_for_both(images, tmp_path):
    folder, bad = tmp_path / "run", UPDATES + 2
    argv = arguments(images, folder, epochs=2, batch_size=2, update_freq=2)
    at = dict(rank=1, phase="forward", update=bad, do="infinite_loss")
    ranks = start(argv, tmp_path / "console", 2, at=[at])
    assert codes(ranks) == [0, 0], ranks[0].text()
    assert [line["nonfinite_updates"] for line in result(folder)["log"]] == [0, 1]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["kind"] == "nonfinite"]
    assert (event["update"], event["rank"], event["reproduced"], len(event["images"])) == (bad, 1, True, 4)
    assert "Update" not in ranks[1].text()
    assert ranks[0].text().count(f"Update {bad} was not applied") == 1
