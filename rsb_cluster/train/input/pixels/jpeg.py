"""Cutting a JPEG to its topmost rows before decoding, as three quarters of the decoding time is reading its bits.

A baseline JPEG is coded from top to bottom, so a decoder that finds a smaller height in the header stops early, and its
rows are those of the whole image, bit for bit. libjpeg then warns of the data that it skips, and this warning must be
ignored with all its other warnings. So only files without a stray marker are cut: PIL accepts all damaged files that
pass this check, and decodes them to the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BASELINE, _SCAN, _STUFFING, _FILL = 0xC0, 0xDA, 0x00, 0xFF
_END = b"\xff\xd9"
_BLOCK_PX = 8


@dataclass(frozen=True, slots=True)
class Baseline:
    """The headers of a baseline JPEG.

    Attributes:
        height: Height, px.
        width: Width, px.
        channels: 1 for grey, 3 for colour, 4 for CMYK.
        mcu_px: Height of an MCU, px: rows that are coded together.
        height_at: Offset of the height in the file.
        data_at: Offset of the scan header, the last of the headers.
    """

    height: int
    width: int
    channels: int
    mcu_px: int
    height_at: int
    data_at: int


def read_headers(encoded: bytes | memoryview) -> Baseline | None:
    """Return the headers; None if the file is not a baseline JPEG, or is damaged."""
    if encoded[:2] != b"\xff\xd8":
        return None
    frame_at, at = 0, 2
    try:
        while (marker := encoded[at + 1]) != _SCAN:
            if encoded[at] != 0xFF or marker in (_STUFFING, _FILL) or (marker == _BASELINE and frame_at):
                return None
            if marker == _BASELINE:
                frame_at = at + 4
            at += 2 + (encoded[at + 2] << 8 | encoded[at + 3])
        if not frame_at or encoded[at] != 0xFF:
            return None
        _, high, low, wide, narrow, channels = encoded[frame_at : frame_at + 6]
        factors = [encoded[frame_at + 7 + 3 * i] & 15 for i in range(channels)]
    except (IndexError, ValueError):
        return None
    if not channels:
        return None
    return Baseline(high << 8 | low, wide << 8 | narrow, channels, _BLOCK_PX * max(factors), frame_at + 1, at + 2)


def cut_to_rows(encoded: bytes | memoryview, headers: Baseline, rows: int) -> bytearray | None:
    """Return a JPEG of at least the topmost ``rows`` rows of the image, which are exact.

    It has all bytes of the file. None if cutting saves nothing, or the file does not consist of a single scan without
    restart markers, stray markers and data after its end.
    """
    # One row more, as the smooth upsampling of colours reads the row below.
    rows = -(-(rows + 1) // headers.mcu_px) * headers.mcu_px
    if rows >= headers.height or encoded[-2:] != _END:
        return None
    # In coded data 0xFF is followed by a zero; otherwise it is a marker, and only the end marker is allowed.
    content = np.frombuffer(encoded, dtype=np.uint8, offset=headers.data_at)[:-1]
    if ((content[:-1] == 0xFF) & (content[1:] != _STUFFING)).any():
        return None
    cut = bytearray(encoded)
    cut[headers.height_at : headers.height_at + 2] = rows.to_bytes(2, "big")
    return cut
