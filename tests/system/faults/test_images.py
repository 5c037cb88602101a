"""Images that cannot be read, from the folder to the last line; what is unreadable stands in tests/unit/datasets."""
import json
from pathlib import Path

from tests.kits.faults import Place, Row, check, table

TRAINED = "--resume {trained}/checkpoint-0.pth --output_dir {here}/out"


def broken(part: str, *names: str):
    """These images of `part` are empty files."""
    def prepare(place: Place) -> None:
        for name in names:
            (place.data / part / name).write_bytes(b"")
    return prepare


def counted(place: Place) -> None:
    result = json.loads((place.here / "out" / "eval.json").read_text())
    assert result["images"] == 8 and result["bad_images"] == 1 and result["hits1"] < 8


def events(place: Place) -> list[dict]:
    lines = (place.run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "unreadable_image"]


def named_once(place: Place) -> None:
    images = [Path(path) for event in events(place) for path in event["images"]]
    assert sorted(images) == [place.data / "train" / "cat" / "2.JPEG", place.data / "val" / "dog" / "1.JPEG"]


def both_parts(place: Place) -> None:
    broken("train", "cat/2.JPEG")(place)
    broken("val", "dog/1.JPEG")(place)


@table([
    Row("a bad image ends an evaluation", TRAINED, 2, ("{data}/val/cat/2.JPEG", "--allow_bad_images true"),
        broken("val", "cat/2.JPEG"), base="eval"),
    Row("a bad image ends an evaluation with workers", f"{TRAINED} --num_workers 2", 2, ("{data}/val/cat/2.JPEG",),
        broken("val", "cat/2.JPEG"), base="eval"),
    Row("a bad image allowed stays in the denominator", f"{TRAINED} --allow_bad_images true", 0, (),
        broken("val", "cat/2.JPEG"), counted, base="eval"),
    Row("a training goes through and names each file once", "--epochs 3", 0,
        ("{data}/train/cat/2.JPEG", "{data}/val/dog/1.JPEG", "epoch 3/3 done"), both_parts, named_once),
    Row("the same with workers", "--epochs 3 --num_workers 2", 0, ("{data}/train/cat/2.JPEG",), both_parts, named_once),
    Row("nothing but bad images", "--num_workers 1", 2, ("{data}/train",),
        broken("train", *(f"{name}/{i}.JPEG" for name in ("cat", "dog") for i in range(8)))),
])
def test_images(row, place, capfd):
    check(row, place, capfd)
