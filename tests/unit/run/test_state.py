"""What a checkpoint holds: formats, odd entries, whose run it is, where a run stands."""
import pytest
import torch

from run.checkpoint import load
from run.state import FORMAT, TABLE, Position, check_resumable, check_same_run, finished, upgrade
from tests.kits.docs import ROOT
from tests.kits.errors import refused

GOOD = {"format": FORMAT, "model": {}, "optimizer": {"state": {}, "param_groups": [{"params": [0]}]}, "epoch": 3}


def test_stored_files_of_every_format_stay_readable():
    published, own = (load(ROOT / f"tests/data/checkpoints/format{number}.pth").state for number in (1, 2))
    for state in (published, own):
        check_resumable(state, "stored")
        assert torch.equal(state["model"]["head.weight"], torch.arange(6.0).view(2, 3))
        assert state["args"]["model"] == "hornet_tiny_7x7" and state["epoch"] == 3
        assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3 and set(TABLE) <= set(state)
    assert [(state["format"], state["update"]) for state in (published, own)] == [(1, None), (2, 40)]
    assert upgrade({**GOOD, "format": 2, "pictures": 7}, "")["images"] == 7
    best = upgrade({"model": {"w": torch.ones(1)}, "optimizer": {}, "epoch": "best", "args": None}, "")
    assert best["epoch"] is None and best["args"] is None
    with refused("not_resumable", "best.pth", "--finetune"):
        check_resumable(best, "best.pth")


@pytest.mark.parametrize("odd", [{"format": FORMAT + 1, "model": {}}, {"format": "x"}, [1]], ids=str)
def test_other_formats_are_refused(odd):
    with refused("invalid_checkpoint", "c.pth"):
        upgrade(odd, "c.pth")


@pytest.mark.parametrize("name, value", [
    ("model", [1]), ("model_ema", [1]), ("model_ema", {"w": 1}), ("optimizer", {}), ("epoch", -2),
    ("update", "x"), ("scaler", {"scale": "x"}), ("policy", {"row": None}), ("policy", {"row": -1}),
    ("sums", [None, "x"]), ("images", 0), ("classes", [1]), ("args", []), ("code_paths", {"a": 1}),
    ("threads", -1), ("kernels", 1), ("order", 2), ("version", 3), ("global_batch", 0)])
def test_an_odd_entry_is_refused_by_name(name, value):
    check_resumable(GOOD, "c.pth")
    with refused("not_resumable", f"entry {name} "):
        check_resumable(GOOD | {name: value}, "c.pth")


def test_another_run_in_the_folder_is_named():
    args = {"model": "hornet_tiny_7x7", "lr": 4e-3, "epochs": 300, "opt_betas": [0.9, 0.99]}
    same = args | {"epochs": 400, "opt_betas": (0.9, 0.99)}
    lr, model, there = same | {"lr": 1e-3}, same | {"model": "hornet_base_gf"}, {"args": args}
    assert check_same_run(there, same, "c.pth") == []
    assert check_same_run(there, lr, "c.pth", explicit=True) == ["lr 0.004 there, 0.001 here"]
    for here, explicit in ((lr, False), (model, True)):
        with refused("other_run", "c.pth"):
            check_same_run(there, here, "c.pth", explicit=explicit)
    assert [finished({"epoch": epoch}, 300) for epoch in (299, 298, None)] == [True, False, False]


@pytest.mark.parametrize("epoch, update, sums, stands", [
    (1, 20, None, (2, 0)), (1, 25, [0.0] * 6, (2, 5)), (1, 30, [0.0] * 6, (2, 10)), (1, None, None, (2, 0)),
    (1, 30, None, None), (1, 25, None, None), (1, 31, [0.0] * 6, None), (1, 19, None, None)])
def test_a_position_lies_in_the_epoch_after_the_last_one_finished(epoch, update, sums, stands):
    position, state = Position(10), {"epoch": epoch, "update": update, "sums": sums}
    if stands is None:
        with refused("other_run", "--finetune"):
            position.load_state_dict(state)
    else:
        position.load_state_dict(state)
        assert (position.begun, position.update_in_epoch) == stands
