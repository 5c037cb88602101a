"""What a checkpoint holds: formats, odd entries, whose run it is, where a run stands."""
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from run.checkpoint import load
from run.state import FORMAT, TABLE, Position, Setup, check_resumable, check_same_run, finished, upgrade

STORED = Path(__file__).parents[2] / "data" / "checkpoints"
OPTIMIZER = {"state": {}, "param_groups": [{"params": [0]}]}
GOOD = {"format": FORMAT, "model": {}, "optimizer": OPTIMIZER, "epoch": 3}


def code_of(call, *args, **named) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **named)
    return caught.value.code


def test_stored_files_of_every_format_stay_readable():
    published, own = load(STORED / "format1.pth").state, load(STORED / "format2.pth").state
    for state in (published, own):
        check_resumable(state, "stored")
        assert torch.equal(state["model"]["head.weight"], torch.arange(6.0).view(2, 3))
        assert state["args"]["model"] == "hornet_tiny_7x7" and state["epoch"] == 3
        assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3
        assert set(TABLE) <= set(state)
    assert published["format"] == 1 and published["update"] is None
    assert own["format"] == 2 and own["update"] == 40
    assert upgrade({**GOOD, "format": 2, "pictures": 7}, "")["images"] == 7


def test_published_best_files_and_odd_files(tmp_path):
    path = tmp_path / "checkpoint-best.pth"
    torch.save({"model": {"w": torch.ones(1)}, "optimizer": {}, "epoch": "best", "args": None}, path)
    old = load(path).state
    assert old["epoch"] is None and old["args"] is None
    assert code_of(check_resumable, old, path) == "not_resumable"
    for odd in ({"format": FORMAT + 1, "model": {}}, {"format": "x"}, [1]):
        torch.save(odd, path)
        assert code_of(load, path) == "invalid_checkpoint"


@pytest.mark.parametrize("name, value", [
    ("model", [1]), ("model_ema", [1]), ("model_ema", {"w": 1}), ("optimizer", {}), ("epoch", -2),
    ("update", "x"), ("scaler", {"scale": "x"}), ("policy", {"row": None}), ("policy", {"row": -1}),
    ("sums", [None, "x"]), ("images", 0), ("classes", [1]), ("args", []), ("code_paths", {"a": 1}),
    ("threads", -1), ("kernels", 1), ("order", 2), ("version", 3), ("global_batch", 0)])
def test_an_odd_entry_is_refused_by_name(name, value):
    check_resumable(GOOD, "c.pth")
    with pytest.raises(UserError, match=f"entry {name} ") as caught:
        check_resumable(GOOD | {name: value}, "c.pth")
    assert caught.value.code == "not_resumable"


@pytest.mark.parametrize("changed, noted", [({}, ""), ({"order": "b" * 64}, "in order bbbb"), ({"images": 9}, "9 images")])
def test_other_images_are_noted_even_if_they_are_as_many(changed, noted):
    here = Setup(global_batch=4, images=8, order="a" * 64, classes=["x"], args={}, code_paths={}, threads=torch.get_num_threads(),
                 kernels="k", version="v")
    here.load_state_dict(here.state_dict() | changed)
    assert bool(here.other_images) == bool(changed) and noted in here.other_images


def test_another_run_in_the_folder_is_named():
    args = {"model": "hornet_tiny_7x7", "lr": 4e-3, "epochs": 300, "opt_betas": [0.9, 0.99]}
    there = {"args": args}
    same = args | {"epochs": 400, "opt_betas": (0.9, 0.99)}
    lr, model = {"lr": 1e-3}, {"model": "hornet_base_gf"}
    assert check_same_run(there, same, "c.pth") == []
    assert code_of(check_same_run, there, same | lr, "c.pth") == "other_run"
    assert check_same_run(there, same | lr, "c.pth", explicit=True) == ["lr 0.004 there, 0.001 here"]
    assert code_of(check_same_run, there, same | model, "c.pth", explicit=True) == "other_run"
    assert finished({"epoch": 299}, 300) and not finished({"epoch": 298}, 300)
    assert not finished({"epoch": None}, 1)


@pytest.mark.parametrize("epoch, update, sums, stands", [
    (1, 20, None, (2, 0)), (1, 25, [0.0] * 6, (2, 5)), (1, 30, [0.0] * 6, (2, 10)), (1, None, None, (2, 0)),
    (1, 30, None, None), (1, 25, None, None), (1, 31, [0.0] * 6, None), (1, 19, None, None)])
def test_a_position_lies_in_the_epoch_after_the_last_one_finished(epoch, update, sums, stands):
    position, state = Position(10), {"epoch": epoch, "update": update, "sums": sums}
    if stands is None:
        assert code_of(position.load_state_dict, state) == "other_run"
    else:
        position.load_state_dict(state)
        assert (position.begun, position.update_in_epoch) == stands
