"""What the first bytes of an image file tell, for files as Pillow writes them."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.image_files import SNIFFED_BYTES, damage, is_unknown, is_wide, sniff
from tests.command import ROOT
from tests.unit import formats

GREY16 = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
FLOAT = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


def written(pixels, format):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


PGM16 = b"P5\n8 8\n65535\n" + GREY16.astype(">u2").tobytes()
FORMATS = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif",
    "JPEG2000": "jp2", "PPM": "ppm",
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_known_by_its_first_bytes(format):
    content = formats.picture(1, format=format)
    assert sniff(content[:SNIFFED_BYTES]) == FORMATS[format]
    assert not is_wide(content)


@pytest.mark.parametrize("start", [b"", b"<html>", b"\0\0\0\x18ftypheic\0\0", b"RIFF1234WAVE", b"PK"])
def test_other_bytes_are_no_image(start):
    assert sniff(start) == ""
    assert not is_wide(start)


@pytest.mark.parametrize(
    "content",
    [written(GREY16, "PNG"), written(GREY16, "TIFF"), written(FLOAT, "TIFF"), written(GREY16, "JPEG2000"), PGM16],
)
def test_images_whose_values_pillow_cuts_off_are_found(content):
    assert is_wide(content)
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.isin(pixels, (0, 1, 255)).mean() > 0.9  # what training would see


def test_eight_bits_and_colour_are_not_cut_off():
    assert not is_wide(written(GREY16.astype(np.uint8), "PNG"))
    assert not is_wide(written(GREY16.astype(np.uint8), "TIFF"))


def test_a_damaged_image_and_another_file_are_told_apart():
    whole = formats.picture(1)
    assert damage(whole) == ""
    assert damage(b"<html>not found</html>") == "it is no image: its first bytes are b'<html>not found<'"
    assert is_unknown(b"<html>")
    assert not is_unknown(whole[:40])
    assert "first bytes" not in damage(whole[:40])
    assert damage(whole[:40])
    assert damage(b"\xff\xd8\xff") == "it is damaged at its start (3 bytes)"
    assert not is_unknown(b"P2 1 1 255 7")
    assert damage(b"P2 1 1 255 7") == ""


def test_what_pillow_warns_of_without_a_name_is_not_printed(tmp_path):
    with Image.open(io.BytesIO(formats.picture(0))) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png", transparency=bytes(range(256)))
    program = (
        "import sys; from pathlib import Path; from rsb_cluster.data.recode import Recode;"
        "print(Recode(8)('p', Path(sys.argv[1]).read_bytes(), 'png')[1])"
    )
    command = [sys.executable, "-c", program, tmp_path / "p.png"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (b"jpg\n", b"")
