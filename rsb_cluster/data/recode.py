"""Downscales large images before they are stored."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rsb_cluster.data.image_files import WIDE_MODES, failure
from rsb_cluster.errors import ConfigError, DataError

QUALITY = 95


@dataclass(frozen=True)
class Recode:
    """Downscales images whose longer side is above a limit to JPEGs of that side; all others keep their bytes.

    Images whose values Pillow cuts off (`rsb_cluster.data.image_files.is_wide`) are kept, too: a JPEG would make that
    final. The EXIF orientation is dropped and not applied: no reader of this package (nor of timm) applies it.

    Attributes:
        max_side: Maximum length of the longer side, px.
        quality: Quality of the JPEGs, 1 to 100.
    """

    max_side: int
    quality: int = QUALITY

    def __post_init__(self) -> None:
        if self.max_side < 1 or not 1 <= self.quality <= 100:
            raise ConfigError(
                f"cannot downscale to {self.max_side} px at quality {self.quality}. Use 1 px or more, and 1 to 100."
            )

    def __call__(self, name: str, content: bytes, extension: str) -> tuple[bytes, str]:
        """Return the image file to store, and its extension; the name is for messages.

        Raises:
            DataError: The image cannot be decoded.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content)) as image:
                longer = max(image.size)
                if longer <= self.max_side or image.mode in WIDE_MODES:
                    return content, extension
                size = [max(1, round(side * self.max_side / longer)) for side in image.size]
                pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
                smaller = pixels.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        except Exception as error:  # PIL's readers raise nearly anything on damaged files
            raise DataError(
                f"the image {name} cannot be decoded, and so not downscaled: {failure(content, error)}. "
                "Replace it, or make the shards without --max-side."
            ) from error
        buffer = io.BytesIO()
        smaller.save(buffer, format="JPEG", quality=self.quality, optimize=True)
        return buffer.getvalue(), "jpg"
