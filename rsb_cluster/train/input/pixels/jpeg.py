"""Cutting a JPEG to its topmost rows before it is decoded: three quarters of a decode is reading its bits.

A baseline JPEG is coded from top to bottom, so a decoder that is told of a smaller height stops early, and the rows
that it gives are those of the whole image, bit for bit. What lies behind is then skipped, and libjpeg's warning of it
has to be ignored, with all its other warnings. So only files without a stray marker are cut: of the damaged ones, PIL
refuses none that passes this check, and decodes them to the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BASELINE, _SCAN, _STUFFING, _FILL = 0xC0, 0xDA, 0x00, 0xFF
_END = b"\xff\xd9"
_BLOCK_PX = 8


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the headers of a baseline JPEG say.

    Attributes:
        height: In px.
        width: In px.
        channels: 1 is grey, 3 are colours, 4 are CMYK.
        mcu_px: Rows that are coded together.
        height_at: Where in the file its height is.
        data_at: Where the headers end, but for the last.
    """

    height: int
    width: int
    channels: int
    mcu_px: int
    height_at: int
    data_at: int


def read_headers(encoded: bytes | memoryview) -> Baseline | None:
    """Return what the headers say; None where it is not a baseline JPEG, or a damaged one."""
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
    """Return a JPEG of the image's topmost rows, at least ``rows`` of them and exact in those.

    It holds all of the file's bytes. None where nothing is saved, or the file is not a plain one: a single scan, no
    restart markers, nothing stray and nothing behind its end.
    """
    # One row more: the smooth upsampling of colours looks at the row below.
    rows = -(-(rows + 1) // headers.mcu_px) * headers.mcu_px
    if rows >= headers.height or encoded[-2:] != _END:
        return None
    # In coded data 0xFF is followed by a zero; without one it is a marker, and there must be the last only.
    content = np.frombuffer(encoded, dtype=np.uint8, offset=headers.data_at)[:-1]
    if ((content[:-1] == 0xFF) & (content[1:] != _STUFFING)).any():
        return None
    cut = bytearray(encoded)
    cut[headers.height_at : headers.height_at + 2] = rows.to_bytes(2, "big")
    return cut
