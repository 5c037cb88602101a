"""Bad and odd pictures: replaced in training, an error or a wrong answer in evaluation, never a crash."""
import io
import os
import struct
import tempfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datasets.build import build_data, eval_loader, train_loader
from datasets.check import check_sample
from datasets.device import EvalPrepare
from datasets.images import BadImage, decode, decode_path
from datasets.sampler import GlobalBatchSampler
from tests.kits.options import data_options

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str, **arguments) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **arguments)
    return buffer.getvalue()


def _jpeg() -> bytes:
    return encoded(Image.fromarray(PIXELS), "JPEG")


def bomb() -> bytes:
    """A PNG that says 30000 x 30000."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BAD = {"empty": lambda: b"", "truncated": lambda: _jpeg()[:-900], "two bytes short": lambda: _jpeg()[:-2],
       "text": lambda: b"<html>404 not found</html>", "bomb": bomb, "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n" * 30,
       "header only": lambda: _jpeg()[:20], "broken PNG": lambda: encoded(Image.fromarray(PIXELS), "PNG")[:300]}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_a_bad_picture_with_a_reason(kind):
    with pytest.raises(BadImage) as caught:
        decode(io.BytesIO(BAD[kind]()))
    assert 3 < len(str(caught.value)) < 220 and "\n" not in str(caught.value)


def test_odd_but_readable_pictures_are_what_convert_rgb_makes_of_them():
    rgb = Image.fromarray(PIXELS)
    palette = rgb.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = {
        "png named jpeg": encoded(rgb, "PNG"), "gray": encoded(rgb.convert("L"), "JPEG"),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"), "palette": encoded(palette, "PNG", transparency=bytes(range(16))),
        "16 bit": encoded(Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257), "PNG"),
        "rgba": encoded(rgb.convert("RGBA"), "PNG"), "one bit": encoded(rgb.convert("1"), "PNG"),
        "rotated by EXIF": encoded(rgb, "JPEG", exif=exif),
        "EXIF nonsense": encoded(rgb, "JPEG", exif=b"Exif\0\0" + b"\xff" * 50)}
    for kind, data in odd.items():
        picture = decode(io.BytesIO(data))
        assert picture.mode == "RGB" and picture.size == (64, 48), kind
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))), kind


def test_a_loop_of_links_a_missing_file_and_a_folder_are_bad_pictures(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    for path in ("a.jpg", "none.jpg", "."):
        with pytest.raises(BadImage):
            decode_path(str(tmp_path / path))


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users as Unix has them")
def test_a_picture_that_one_may_not_read_is_a_bad_picture():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "a.jpg")
        with open(path, "wb") as file:
            file.write(_jpeg())
        assert decode_path(path).size == (64, 48)
        os.chmod(path, 0)
        me = os.geteuid()
        try:
            if me == 0:  # whom permissions do not bind
                os.seteuid(65534)
            with pytest.raises(BadImage, match="^Permission denied$"):
                decode_path(path)
        finally:
            os.seteuid(me)


@pytest.fixture
def folder(tmp_path):
    """Two classes with ten pictures each in train and val; in each part three cannot be read."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            for i in range(10):
                (where / f"{i}.JPEG").write_bytes(_jpeg())
        (tmp_path / part / "cat" / "3.JPEG").write_bytes(b"")
        (tmp_path / part / "dog" / "7.JPEG").write_bytes(_jpeg()[:500])
        (tmp_path / part / "dog" / "8.JPEG").unlink()
        (tmp_path / part / "dog" / "8.JPEG").symlink_to("nowhere")
    return tmp_path


def _options(folder, **changes):
    return data_options(data_set="IMNET", data_path=str(folder), input_size=32, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_counts_and_names_them_the_same_way_each_time(folder, workers):
    options = _options(folder, num_workers=workers)
    data = build_data(options, train=True, evaluate=False)
    runs = []
    for _ in range(2):
        sampler = GlobalBatchSampler(20, 4, 4, 1)
        loader = train_loader(data, options, sampler)
        runs.append(list(loader))
        bad = {os.path.basename(data.train.path(i)) for i in loader.bad_images}
        assert bad == {"3.JPEG", "7.JPEG", "8.JPEG"} and sum(loader.bad_images.values()) == 3
        loader.close()
    assert sum(int(batch.bad.sum()) for batch in runs[0]) == 3
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.targets, second.targets)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_refuses_in_one_sentence_or_counts_them_as_wrong(folder, workers):
    options = _options(folder, num_workers=workers)
    data = build_data(options, train=False, evaluate=True)
    with pytest.raises(UserError, match=r"^Image .*cat.3\.JPEG cannot be read .*--allow_bad_images true\.$"):
        list(eval_loader(data, options))
    options.allow_bad_images = True
    loader = eval_loader(data, options)
    prepare = EvalPrepare(options, "cpu")
    targets = torch.cat([prepare(batch)[1] for batch in loader])
    assert len(targets) == 20 and int((targets == -100).sum()) == 3 and len(loader.bad_images) == 3
    loader.close()


def test_nothing_but_bad_pictures_ends_with_a_sentence(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "train" / "a" / f"{i}.jpg").write_bytes(b"nothing")
    options = _options(tmp_path, num_workers=1)
    data = build_data(options, train=True, evaluate=False)
    loader = train_loader(data, options, GlobalBatchSampler(8, 4, 4, 1))
    with pytest.raises(UserError, match=r"^20 images in a row are unreadable.*check the disk and the data path\.$"):
        list(loader)
    loader.close()


def test_the_sample_check_names_what_it_finds(folder):
    data = build_data(_options(folder), train=False, evaluate=True)
    found = check_sample(data.val, 20)
    assert found.looked == 20 and found.classes == 2 and len(found.unreadable) == 3 and not found.tiny
    assert "20 images of 2 classes" in found.sentences()[0] and "3.JPEG" in found.sentences()[1]


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path):
    where = os.path.join(os.fsencode(tmp_path), b"train", b"caf\xe9")
    os.makedirs(where)
    with open(os.path.join(where, b"na\xefve.jpg"), "wb") as file:
        file.write(_jpeg())
    options = _options(tmp_path)
    data = build_data(options, train=True, evaluate=False)
    assert data.train.image(0).size == (64, 48)
    assert all(note.encode() for note in data.notes) and check_sample(data.train).sentences()[0].encode()
