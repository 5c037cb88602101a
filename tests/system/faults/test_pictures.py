"""Pictures that cannot be read or are not what their names say, from the folder to the last line."""
import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.kits.faults import Place, Row, check, table
from tests.kits.images import bomb, encoded, jpeg

TRAINED = "--resume {trained}/checkpoint-0.pth --output_dir {here}/out"
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)


def with_picture(data: bytes | None, part: str = "val"):
    """The third cat of `part` is `data`; None: a link to itself."""
    def prepare(place: Place) -> None:
        picture = place.data / part / "cat" / "2.JPEG"
        picture.unlink()
        picture.symlink_to(picture) if data is None else picture.write_bytes(data)
    return prepare


BAD = {"empty": (b"", "no JPEG, PNG"), "cut short": (jpeg(1)[:-400], "truncated"),
       "a web page": (b"<html>404</html>", "no JPEG"), "a bomb of 900 million pixels": (bomb(), "DecompressionBomb"),
       "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9, "no JPEG"), "a loop of links": (None, "symbolic links")}


@table([Row(f"{name} in evaluation", TRAINED, 2,
            ("Image {data}/val/cat/2.JPEG cannot be read", reason, "--allow_bad_images true"), with_picture(data),
            base="eval") for name, (data, reason) in BAD.items()])
def test_a_bad_picture_ends_an_evaluation(row, place, capfd):
    check(row, place, capfd)


def counted(place):
    result = json.loads((place.here / "out" / "eval.json").read_text())
    assert result["images"] == 8 and result["bad_images"] == 1 and result["hits1"] < 8


@table([Row(f"{name} allowed", f"{TRAINED} --allow_bad_images true", 0, (" of 8 pictures right",),
            with_picture(BAD[name][0]), counted, base="eval") for name in ("empty", "a loop of links")])
def test_a_bad_picture_allowed_stays_in_the_denominator(row, place, capfd):
    check(row, place, capfd)


@table([Row(f"{name} in training", "", 0, ("unreadable image {data}/train/cat/2.JPEG", "replaced by another"),
            with_picture(BAD[name][0], "train")) for name in ("cut short", "a bomb of 900 million pixels")]
       + [Row("nothing but bad pictures", "", 2, ("images in a row are unreadable", "check the disk and the data path"),
              lambda place: [p.write_bytes(b"") for p in (place.data / "train").rglob("*.JPEG")])])
def test_training_replaces_bad_pictures(row, place, capfd):
    check(row, place, capfd)


def odd() -> dict[str, bytes]:
    rgb = Image.fromarray(PIXELS)
    deep = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
    return {"a PNG named JPEG": encoded(rgb, "PNG"), "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
            "gray": encoded(rgb.convert("L"), "JPEG"), "16 bit": encoded(deep, "PNG"),
            "a palette with transparency": encoded(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
            "EXIF nonsense": encoded(rgb, "JPEG", exif=b"Exif\0\0" + b"\xff" * 50),
            "one pixel": encoded(rgb.crop((0, 0, 1, 1)), "PNG"), "a thin strip": encoded(rgb.resize((900, 2)), "JPEG")}


@pytest.mark.parametrize("part, row", [
    ("val", Row("evaluation", TRAINED, 0, ("of 16 pictures right",), base="eval")),
    ("train", Row("training", "--aa rand-m9-mstd0.5-inc1 --reprob 0.5", 0, ("24 images in 2 of 2 classes",),
                  unsaid=("unreadable", "replaced")))], ids=["evaluation", "training"])
def test_odd_but_readable_pictures_are_used(part, row, place, capfd):
    for name, data in odd().items():
        (place.data / part / "dog" / f"{name}.JPEG").write_bytes(data)
    check(row, place, capfd)


def test_pictures_one_may_not_read(place, capfd):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    (place.data / "val" / "cat" / "2.JPEG").chmod(0)
    check(Row("permission", TRAINED, 2, ("Permission denied",), base="eval"), place, capfd)
