"""Photographs of ImageNet's sizes, made from what packages ship: the input of the loader's benchmark.

Random crops, 0.8 to 3.5 times the target, of the sample photographs of scikit-learn and, where ``apt-get download``
gets them, of Debian's wallpaper packages; scaled down to ImageNet's sizes and saved as baseline JPEG of quality 94 to
96. What is out of focus is left out, as wallpapers are softer than ImageNet's snapshots: the files come to ImageNet's
110 kB, that is 4.6 bit a pixel, which decides how long a decoder takes. Seeded: the same photographs give the same
files.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

PACKAGES = (
    "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)  # fmt: skip
# Width, height, share in percent: as ImageNet's training images, 462 x 397 in the mean.
SIZES = (
    (500, 375, 34), (500, 333, 16), (375, 500, 12), (333, 500, 6), (500, 400, 4), (400, 500, 2), (500, 500, 3),
    (400, 300, 5), (300, 400, 3), (400, 400, 3), (320, 240, 3), (250, 250, 3), (640, 480, 3), (800, 600, 2),
    (768, 1024, 1),
)  # fmt: skip
SHARD_SAMPLES = 500
SHARP_PHOTOGRAPH, SHARP_CROP = 1.8, 3.6  # bit per pixel at quality 95; of a photograph at half its size


def photographs(folder: Path) -> list[Image.Image]:
    """Return large photographs; those of Debian's packages are unpacked into the folder."""
    found = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not any(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True)
    for archive in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    Image.MAX_IMAGE_PIXELS = None
    for path in sorted([*folder.rglob("*.jpg"), *folder.rglob("*.jpeg")]):
        if path.is_symlink():
            continue
        with Image.open(path) as image:
            if min(image.size) >= 1000:
                image = image.convert("RGB")
                if _density(_jpeg(image.reduce(2), 95), image.width * image.height / 4) >= SHARP_PHOTOGRAPH:
                    found.append(image)
    return found


def make(folder: Path, samples: int) -> str:
    """Write ``samples`` JPEG files as shards into ``folder``, unless they are there; return what they are."""
    wanted = f"{samples} images, recipe {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
    done = folder / "done"
    if done.exists() and done.read_text().splitlines()[0] == wanted:
        return done.read_text().splitlines()[1]
    rng = np.random.default_rng(0)
    sources = photographs(folder / "photographs")
    weights = np.array([share for _, _, share in SIZES])
    shards = folder / "train"
    shards.mkdir(parents=True, exist_ok=True)
    for old in shards.iterdir():
        old.unlink()
    sizes, pixels = [], []
    with webdataset.ShardWriter(str(shards / "shard-%06d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
        while len(sizes) < samples:
            width, height, _ = SIZES[rng.choice(len(SIZES), p=weights / weights.sum())]
            jpeg = None
            while jpeg is None:
                jpeg = _crop(sources[rng.integers(len(sources))], width, height, rng)
            writer.write({"__key__": f"{len(sizes):08d}", "jpg": jpeg, "cls": b"%d" % (len(sizes) % 1000)})
            sizes.append(len(jpeg))
            pixels.append(width * height)
    said = (
        f"{samples} images of {np.mean(sizes) / 1000:.1f} kB and {np.mean(pixels) / 1000:.0f} kpx "
        f"({8 * sum(sizes) / sum(pixels):.2f} bit/px) from {len(sources)} photographs"
    )
    done.write_text(f"{wanted}\n{said}\n")
    return said


def _crop(source: Image.Image, width: int, height: int, rng: np.random.Generator) -> bytes | None:
    """Return a random part of a photograph as a JPEG; None for one that does not fit, or is flat or blurred."""
    scale = rng.uniform(0.8, 3.5)
    w, h = round(width * scale), round(height * scale)
    if w > source.width or h > source.height:
        return None
    x, y = rng.integers(source.width - w + 1), rng.integers(source.height - h + 1)
    image = source.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
    jpeg = _jpeg(image, int(rng.integers(94, 97)))
    return jpeg if _density(jpeg, width * height) >= SHARP_CROP else None


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _density(jpeg: bytes, pixels: float) -> float:
    """Bits per pixel."""
    return 8 * len(jpeg) / pixels
