"""Image files: their extensions, what their first bytes say, and which of them Pillow reads without their depth."""

from __future__ import annotations

import io
import warnings
from functools import cache

IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif", "jfif", "jpe", "avif", "jp2",
)  # fmt: skip
# Images that are not read here: the user would miss them.
UNREAD_EXTENSIONS = frozenset(
    (
        "heic", "heif", "jxl", "j2k", "svg", "psd", "exr", "hdr", "dcm", "ico", "tga", "pdf", "eps", "mpo",
        "raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
    )
)  # fmt: skip
_STORED_AS = {"jfif": "jpg", "jpe": "jpg"}  # as other readers of shards know them
_FEATURES = {"avif": "avif", "jp2": "jpg_2000"}  # parts of Pillow that need not be there

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"BM": "bmp"} | dict.fromkeys(
    (b"II*\0", b"MM\0*"), "tif"
)
_ASCII_PNM = (b"P1", b"P2", b"P3", b"P4")
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
SNIFFED_BYTES = 16

# Pillow warns of damaged metadata, palettes and large images by its own lines, without the name of the file. What
# cannot be decoded is named by whoever decodes it.
warnings.filterwarnings("ignore", module=r"PIL\.")

_GREY_16_PNG = b"\x10\x00"  # bit depth and colour type, after width and height
WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def stored_extension(extension: str) -> str:
    """Return the extension under which an image file with an extension is stored in a shard."""
    return _STORED_AS.get(extension, extension)


@cache
def is_readable(extension: str) -> bool:
    """Whether images with an extension can be decoded on this machine."""
    if extension not in _FEATURES:
        return extension in IMAGE_EXTENSIONS
    from PIL import features

    return bool(features.check(_FEATURES[extension]))


def sniff(start: bytes) -> str:
    """Return the extension that the first bytes of an image file tell (`SNIFFED_BYTES` are enough); empty if none."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if start.startswith(_JP2):
        return "jp2"
    if start[:2] in (b"P5", b"P6") and start[2:3].isspace():
        return "pgm" if start[1:2] == b"5" else "ppm"
    return next((extension for magic, extension in _MAGIC.items() if start.startswith(magic)), "")


def is_wide(content: bytes) -> bool:
    """Whether Pillow's ``convert("RGB")`` cuts an image's values off instead of scaling them to 8 bits.

    So it does with grey of 16 and 32 bits, most of which becomes white, and with floating point, of which 0 to 1
    becomes black. Training sees what Pillow makes of it.
    """
    if content[:3] == b"\xff\xd8\xff":  # nearly all images
        return False
    kind = sniff(content[:SNIFFED_BYTES])
    if kind == "png":
        return content[24:26] == _GREY_16_PNG
    if kind not in ("tif", "jp2", "pgm"):
        return False
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:  # reads the header only
            return image.mode in WIDE_MODES
    except Exception:  # damaged: whoever decodes it says so
        return False


def is_unknown(content: bytes) -> bool:
    """Whether the first bytes of a file are those of no image, as of a web page that was saved as one."""
    return not sniff(content[:SNIFFED_BYTES]) and content[:2] not in _ASCII_PNM


def damage(content: bytes) -> str:
    """Decode an image file with Pillow, and return why it cannot be decoded; an empty string if it can."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files (SyntaxError, struct.error)
        return failure(content, error)
    return ""


def failure(content: bytes, error: Exception) -> str:
    """Return in words why Pillow could not decode an image file."""
    if is_unknown(content):
        return f"it is no image: its first bytes are {content[:SNIFFED_BYTES]!r}"
    if type(error).__name__ == "UnidentifiedImageError":  # its message has an address in memory
        return f"it is damaged at its start ({len(content):,} bytes)"
    return f"{type(error).__name__}: {error}"
