"""Make images smaller before they are stored."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rsb_cluster.errors import ConfigError, DataError

QUALITY = 95


@dataclass(frozen=True)
class Recode:
    """Images whose longer side is above a limit become JPEGs of that side; all others keep their bytes.

    An EXIF orientation is dropped and not applied, as all readers of this package (and timm's) do not apply it.

    Attributes:
        max_side: Pixels of the longer side.
        quality: Of the JPEGs, 1 to 100.
    """

    max_side: int
    quality: int = QUALITY

    def __post_init__(self) -> None:
        if self.max_side < 1 or not 1 <= self.quality <= 100:
            raise ConfigError(
                f"a longer side of {self.max_side} at the quality {self.quality} cannot be. Use 1 to 100."
            )

    def __call__(self, key: str, content: bytes, extension: str) -> tuple[bytes, str]:
        """Return the image file that is to be stored, and its extension.

        Raises:
            DataError: The image cannot be decoded.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content)) as image:
                longer = max(image.size)
                if longer <= self.max_side:
                    return content, extension
                size = [max(1, round(side * self.max_side / longer)) for side in image.size]
                pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
                smaller = pixels.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        except Exception as error:  # PIL's readers raise nearly anything on damaged files
            raise DataError(
                f"the image '{key}' cannot be decoded, and so not be made smaller: {type(error).__name__}: {error}. "
                "Replace it, or make the shards without --max-side."
            ) from error
        buffer = io.BytesIO()
        smaller.save(buffer, format="JPEG", quality=self.quality, optimize=True)
        return buffer.getvalue(), "jpg"
