"""Images that cannot be read or are not what their names say, from the folder to the last line."""
import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.kits.faults import Place, Row, check, table
from tests.kits.images import bomb, encoded, jpeg, noise

TRAINED = "--resume {trained}/checkpoint-0.pth --output_dir {here}/out"
BAD = {"empty": b"", "cut short": jpeg(1)[:-400], "a bomb of 900 million pixels": bomb(),
       "a loop of links": None}


def with_image(data: bytes | None, part: str = "val"):
    """The third cat of `part` is `data`; None: a link to itself."""
    def prepare(place: Place) -> None:
        path = place.data / part / "cat" / "2.JPEG"
        path.unlink()
        path.symlink_to(path) if data is None else path.write_bytes(data)
    return prepare


def counted(place):
    result = json.loads((place.here / "out" / "eval.json").read_text())
    assert result["images"] == 8 and result["bad_images"] == 1 and result["hits1"] < 8


@table(
    *(Row(f"{name} in evaluation", TRAINED, "?", ("{data}/val/cat/2.JPEG", "--allow_bad_images true"),
          with_image(data), base="eval") for name, data in BAD.items()),
    Row("allowed, it stays in the denominator", f"{TRAINED} --allow_bad_images true", 0, (), with_image(b""),
        counted, base="eval"),
    Row("in training it is replaced", "", 0, ("{data}/train/cat/2.JPEG",),
        with_image(BAD["cut short"], "train")),
    Row("nothing but bad images", "", "?", ("{data}",),
        lambda place: [p.write_bytes(b"") for p in (place.data / "train").rglob("*.JPEG")]))
def test_unreadable_images(row, place, capfd):
    check(row, place, capfd)


def odd() -> dict[str, bytes]:
    rgb = noise(0, (44, 40))
    deep = Image.fromarray(np.asarray(rgb)[:, :, 0].astype(np.uint16) * 257)
    return {"a PNG named JPEG": encoded(rgb, "PNG"), "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
            "gray": encoded(rgb.convert("L"), "JPEG"), "16 bit": encoded(deep, "PNG"),
            "a palette with transparency": encoded(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
            "EXIF nonsense": encoded(rgb, "JPEG", exif=b"Exif\0\0" + b"\xff" * 50),
            "one pixel": encoded(rgb.crop((0, 0, 1, 1)), "PNG"),
            "a thin strip": encoded(rgb.resize((900, 2)), "JPEG")}


@pytest.mark.parametrize("part, row", [
    ("val", Row("evaluation", TRAINED, 0, ("16",), base="eval")),
    ("train", Row("training", "--aa rand-m9-mstd0.5-inc1 --reprob 0.5", 0, ("24",), absent=("unreadable",)))],
    ids=["evaluation", "training"])
def test_odd_but_readable_images_are_used(part, row, place, capfd):
    for name, data in odd().items():
        (place.data / part / "dog" / f"{name}.JPEG").write_bytes(data)
    check(row, place, capfd)


def test_images_one_may_not_read(place, capfd):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    (place.data / "val" / "cat" / "2.JPEG").chmod(0)
    check(Row("permission", TRAINED, "?", ("{data}/val/cat/2.JPEG",), base="eval"), place, capfd)
