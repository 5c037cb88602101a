"""Decoding: what cannot be read is a BadImage with a reason, and odd images are what the docstring
promises."""
import io
import os

import numpy as np
import pytest
from PIL import Image

import native
from datasets.images import BadImage, decode, extensions, is_image, read_file, transformed
from tests.kits.images import bomb, encoded, noise

RGB = noise(0, (64, 48))
PIXELS, JPEG = np.array(RGB), encoded(RGB, "JPEG")
GREY16 = PIXELS[:, :, 0].astype(np.uint16) * 257
CLEAR = RGB.convert("RGBA")
CLEAR.putalpha(0)
BAD = {"empty": b"", "truncated": JPEG[:-900], "two bytes short": JPEG[:-2], "bomb": bomb(),
       "text": b"<html>404 not found</html>", "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n" * 30, "header only": JPEG[:20],
       "broken PNG": encoded(RGB, "PNG")[:300], "32-bit floats": encoded(RGB.convert("F"), "TIFF"),
       "32-bit integers": encoded(RGB.convert("I"), "TIFF")}
ODD = {"png named jpeg": encoded(RGB, "PNG"), "grey": encoded(RGB.convert("L"), "JPEG"),
       "cmyk": encoded(RGB.convert("CMYK"), "JPEG"), "one bit": encoded(RGB.convert("1"), "PNG"),
       "palette": encoded(RGB.quantize(16), "PNG", transparency=bytes(range(16))),
       "EXIF nonsense": encoded(RGB, "JPEG", exif=b"Exif\0\0" + b"\xff" * 50)}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_a_bad_image_with_a_reason(kind):
    with pytest.raises(BadImage) as caught:
        decode(BAD[kind])
    assert 3 < len(str(caught.value)) < 220 and "\n" not in str(caught.value)


def test_odd_but_readable_images_are_what_convert_rgb_makes_of_them():
    for kind, data in ODD.items():
        image = decode(data)
        assert image.mode == "RGB" and image.size == (64, 48), kind
        assert np.array_equal(image, Image.open(io.BytesIO(data)).convert("RGB")), kind
    for kind in ("PNG", "TIFF"):  # the colours under transparent parts show
        assert np.array_equal(decode(encoded(CLEAR, kind)), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled_not_cut_off(kind):
    values = np.array(decode(encoded(Image.fromarray(GREY16), kind)))
    assert np.array_equal(values, np.repeat(PIXELS[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_ignored_unless_asked_for_whichever_reader_decodes(kind, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data, plain = encoded(RGB, kind, exif=exif), encoded(RGB, kind)
    upright = np.array(decode(plain))
    for decoder in (native.jpeg(), None):
        monkeypatch.setattr(native, "jpeg", lambda decoder=decoder: decoder)
        assert np.array_equal(transformed(data, np.array), upright)
        assert np.array_equal(transformed(data, np.array, exif_orientation=True), np.rot90(upright, -1))
        assert np.array_equal(transformed(plain, np.array, exif_orientation=True), upright)


def test_every_ending_taken_is_of_a_format_that_decodes():
    assert {".jpg", ".jfif", ".png", ".gif", ".tif", ".webp", ".bmp", ".pgm", ".jp2", ".avif"} <= set(extensions())
    assert not {".eps", ".psd", ".pdf", ".svg", ".ico"} & set(extensions())
    known = Image.registered_extensions()
    for kind in {known[name] for name in extensions()}:
        assert decode(encoded(RGB, kind)).size == (64, 48), kind
    assert is_image("a.JPeG") and not is_image("._a.jpg") and not is_image("jpg") and not is_image("a.txt")


def test_only_regular_files_of_bounded_size_are_opened(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(2 << 30)
    for name in ("a.jpg", "none.jpg", ".", "fifo.jpg", "zero.jpg", "huge.jpg"):
        with pytest.raises(BadImage):
            read_file(str(tmp_path / name))


@pytest.mark.parametrize("error, raised", [
    (PermissionError(13, "Permission denied"), BadImage), (OSError(24, "Too many open files"), OSError)])
def test_no_permission_is_the_images_fault_and_running_out_of_descriptors_is_not(tmp_path, monkeypatch, error, raised):
    (tmp_path / "a.jpg").write_bytes(JPEG)

    def fails(*_, **__):
        raise error
    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(raised, match=error.strerror):
        read_file(str(tmp_path / "a.jpg"))
