"""Mistakes on the command line and in recipes end with one sentence and exit code 2; one row per place that
refuses."""
import json
import os

from tests.kits.faults import Row, check, table

MORE = len(os.sched_getaffinity(0)) + 1


def recipe(text: str):
    """A recipe of the person's own at {here}/r.yaml."""
    return lambda place: (place.here / "r.yaml").write_text(text)


def untouched(place):
    """A refused command line has made no run folder."""
    assert not place.run.exists()


def recorded(place):
    """The run ended and its folder says so."""
    assert json.loads((place.run / "status.json").read_text())["state"] == "DONE"


@table(
    Row("unknown model", "--model hornet_tny_7x7", "?", ("hornet_tiny_7x7",), after=untouched),
    Row("unknown flag", "--batchsize 8", "?", ("--batchsize", "--batch_size")),
    Row("flag without its value", "--lr", "?", ("--lr",)),
    Row("not a number", "--lr nan", "?", ("--lr nan",)),
    Row("misspelt recipe key", "--config {here}/r.yaml", "?", ("weigth_decay", "weight_decay"),
        recipe("weigth_decay: 1\n")),
    Row("recipe that is no text", "--config {data}/train/cat/0.JPEG", "?", ("{data}/train/cat/0.JPEG",)),
    Row("options that contradict each other", "--mixup 0.8 --batch_size 7", "?",
        ("--batch_size 7", "--mixup 0")),
    Row("a batch larger than the data", "--batch_size 64", "?", ("16", "--batch_size")),
    # These two before the images are indexed, which takes minutes.
    Row("unknown optimizer", "--opt adamww", "?", ("--opt adamww", "adamw"), absent=("train: ",)),
    Row("a start that is missing", "--finetune nothere.pth", "?", ("nothere.pth",), absent=("train: ",)),
    Row("nothing to evaluate", "--eval true", "?", ("--resume",), after=untouched),
    Row("best without a folder", "--eval true --resume best --output_dir ''", "?", ("--output_dir",)),
    Row("run folder that is a file", "--output_dir {data}/train/cat/0.JPEG", "?", ("--output_dir", "0.JPEG")),
    Row("report folder that is a file",
        "--eval true --resume {trained}/checkpoint-0.pth --report {data}/train/cat/0.JPEG", "?",
        ("--report",)),
    Row("a check without a published figure", "--eval true --resume {trained}/checkpoint-0.pth --check true",
        1, ("--check true",)),
    Row("more loader processes than CPUs", f"--num_workers {MORE}", 0, (f"--num_workers {MORE}",)),
    Row("a log folder that is a file", "--log_dir {data}/train/cat/0.JPEG", 0, ("TensorBoard",),
        after=recorded),
)
def test_options(row, place, capfd):
    check(row, place, capfd)
