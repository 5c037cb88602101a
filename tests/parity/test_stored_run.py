"""A run that an earlier version left within its second epoch (format 2) is resumed, evaluated and reported.

tests/data/run_v2 is its folder; the checkpoints are packed, their values rounded to a few digits so that they
pack well.
"""
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from common.outcome import Outcome
from main import main
from tests.kits.images import write_images
from tests.kits.runs import assert_equal_bits, result
from tools.data import main as tool
from tools.report import main as report

STORED = Path(__file__).resolve().parents[1] / "data" / "run_v2"
TRAIN, VAL, STOPPED_AT, UPDATES = 22, 9, 7, 10


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), TRAIN, VAL)


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(STORED / "checkpoints.tar.xz") as packed:
        packed.extractall(tmp_path / "run", filter="data")
    return Path(shutil.copytree(STORED, tmp_path / "run", ignore=shutil.ignore_patterns("*.xz"),
                                dirs_exist_ok=True))


def command(images, folder, *more):
    """The run's own command line on the images and folder of this test."""
    first = json.loads((STORED / "attempts.jsonl").read_text().splitlines()[0])
    return [*first["command"][1:], "--data_path", str(images), "--index_cache", str(images / "cache"),
            "--output_dir", str(folder), *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_resumed_where_it_stood_also_on_packed_tars_to_the_same_bits(images, folder, tmp_path):
    assert tool(["pack", str(images), str(tmp_path / "packed"), "--index_cache", str(tmp_path / "cache")]) == 0
    before, ends = lines(folder / "log.txt"), []
    shutil.copytree(folder, tmp_path / "other")
    for run, data in ((folder, images), (tmp_path / "other", tmp_path / "packed")):
        assert main(command(data, run, "--index_cache", str(tmp_path / "cache"))) == 0
        attempts, log = lines(run / "attempts.jsonl"), lines(run / "log.txt")
        assert next(line for line in attempts if line["attempt"] == 2)["from_update"] == STOPPED_AT
        assert Outcome(attempts[-1]["state"]) is Outcome.DONE and attempts[-1]["update"] == UPDATES
        assert log[:1] == before and [line["update"] for line in log] == [UPDATES // 2, UPDATES]
        assert (run / "report.html").exists()
        ends.append({name: result(run)[name] for name in ("model", "model_ema", "optimizer", "log")})
    assert_equal_bits(*ends)


def test_what_scored_in_it_is_evaluated_and_it_is_reported_with_its_word_for_a_pause(images, folder, tmp_path):
    for name, loss, hits in (("checkpoint-best.pth", 1.321328, 3), ("checkpoint-best-ema.pth", 1.217004, 2)):
        assert main(command(images, tmp_path / name, "--eval", "true", "--resume", str(folder / name))) == 0
        found = json.loads((tmp_path / name / "eval.json").read_text())
        assert (found["images"], found["hits1"]) == (VAL, hits) and found["loss"] == pytest.approx(loss, rel=1e-4)
    assert report([str(folder)]) == 0
    assert "hornet_pico_7x7" in (folder / "report.html").read_text("utf-8")
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "PREEMPTED" and Outcome(status["state"]) is Outcome.PAUSED
