"""Photographs of ImageNet's sizes, made from what packages ship: the input of the loader's benchmark.

Random crops, 0.8 to 3.5 times the target, of the sample photographs of scikit-learn and, where ``apt-get download``
gets them, of Debian's wallpaper packages; scaled down to ImageNet's commonest sizes, flat ones left out, saved as JPEG
of quality 94 to 96. Seeded: the same photographs give the same files.
"""

from __future__ import annotations

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
# Width, height, share: the commonest sizes of ImageNet's training images, and some larger.
SIZES = (
    (500, 375, 0.40), (500, 333, 0.19), (375, 500, 0.14), (333, 500, 0.06), (500, 400, 0.05), (400, 400, 0.05),
    (640, 480, 0.06), (350, 263, 0.05),
)  # fmt: skip
SHARD_SAMPLES = 500


def photographs(folder: Path) -> list[Image.Image]:
    """Return large photographs; those of Debian's packages are unpacked into the folder."""
    found = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True)
    for archive in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    Image.MAX_IMAGE_PIXELS = None
    for path in sorted([*folder.rglob("*.jpg"), *folder.rglob("*.jpeg")]):
        with Image.open(path) as image:
            if min(image.size) >= 1000 and not path.is_symlink():
                image.thumbnail((4000, 4000))
                found.append(image.convert("RGB"))
    return found


def make(folder: Path, samples: int) -> None:
    """Write ``samples`` JPEG files as shards into ``folder``; nothing is done where they are already."""
    if (folder / "done").exists():
        return
    rng = np.random.default_rng(0)
    sources = photographs(folder / "photographs")
    weights = np.array([share for _, _, share in SIZES])
    shards = folder / "train"
    shards.mkdir(parents=True, exist_ok=True)
    sizes = []
    with webdataset.ShardWriter(str(shards / "shard-%06d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
        while len(sizes) < samples:
            jpeg = _crop(sources[rng.integers(len(sources))], rng, weights)
            if jpeg is not None:
                writer.write({"__key__": f"{len(sizes):08d}", "jpg": jpeg, "cls": b"%d" % (len(sizes) % 1000)})
                sizes.append(len(jpeg))
    (folder / "done").write_text(
        f"{samples} images of {np.mean(sizes) / 1000:.1f} kB from {len(sources)} photographs\n"
    )


def _crop(source: Image.Image, rng: np.random.Generator, weights: np.ndarray) -> bytes | None:
    width, height, _ = SIZES[rng.choice(len(SIZES), p=weights / weights.sum())]
    scale = rng.uniform(0.8, 3.5)
    w, h = round(width * scale), round(height * scale)
    if w > source.width or h > source.height:
        return None
    x, y = rng.integers(source.width - w + 1), rng.integers(source.height - h + 1)
    image = source.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.LANCZOS)
    if np.asarray(image.convert("L")).std() < 20:
        return None
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(94, 97)), subsampling="4:2:0")
    return file.getvalue()
