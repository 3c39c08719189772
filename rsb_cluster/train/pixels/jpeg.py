"""Cutting a JPEG to its topmost rows before it is decoded: three quarters of a decode is reading its bits.

A baseline JPEG is coded from top to bottom, so a decoder that is told of a smaller height stops early, and the rows
that it gives are those of the whole image, bit for bit. What lies behind is then skipped, and libjpeg's warning of it
has to be ignored, with all its other warnings. So only files without a stray marker are cut: of the damaged ones, PIL
refuses none that passes this check, and decodes them to the same pixels.
"""

from __future__ import annotations

import numpy as np

_BASELINE, _SCAN, _END = b"\xff\xc0", b"\xff\xda", 0xD9
_BLOCK_PX = 8


def cut_to_rows(encoded: bytes | memoryview, rows: int) -> bytearray | None:
    """Return a JPEG of the image's topmost rows, at least ``rows`` of them and exact in those.

    It holds all of the file's bytes. None where nothing is saved, or the file is not a plain one: baseline, a single
    scan, no restart markers, nothing stray and nothing behind its end.
    """
    height_at, at = 0, 2
    while (marker := bytes(encoded[at : at + 2])) != _SCAN:
        if marker == _BASELINE:
            height_at = at + 5
        elif marker[:1] != b"\xff" or marker[1:] in (b"", b"\xff"):
            return None
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    if not height_at:
        return None
    vertical = [encoded[height_at + 6 + 3 * i] & 15 for i in range(encoded[height_at + 4])]
    mcu_px = _BLOCK_PX * max(vertical)
    # One row more: the smooth upsampling of colours looks at the row below.
    rows = -(-(rows + 1) // mcu_px) * mcu_px
    if rows >= int.from_bytes(encoded[height_at : height_at + 2], "big"):
        return None
    # In coded data 0xFF is followed by a zero; without one it is a marker, and there must be the last only.
    content = np.frombuffer(encoded, dtype=np.uint8, offset=at + 2)
    marks = np.flatnonzero(content == 0xFF)
    if not len(marks) or marks[-1] != len(content) - 2 or content[-1] != _END or content[marks[:-1] + 1].any():
        return None
    cut = bytearray(encoded)
    cut[height_at : height_at + 2] = rows.to_bytes(2, "big")
    return cut
