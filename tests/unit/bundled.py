"""The recipes and jobs that come with the package, and what the paper's Table 2 leaves open of them."""

from pathlib import Path

from rsb_cluster.config import catalog
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import parse_overrides

FINE_TUNING = ("ft-cars", "ft-cifar10", "ft-cifar100", "ft-flowers102", "ft-inat2019")
RECIPES = catalog.bundled_dir("recipes")
CLOUD_JOBS = (
    "cloud", "cloud-spot", "cloud-aws-spot", "cloud-gcp-spot", "cloud-azure-spot", "cloud-kubernetes", "cloud-slurm",
)  # fmt: skip
JOBS = ("local", "local-gpu", "slurm", "slurm-cpu", "slurm-spot", *CLOUD_JOBS)


def load_job(name: str, *assignments: str) -> Job:
    """Load a bundled job, whatever jobs the current folder has."""
    path = catalog.bundled_dir("jobs") / f"{name}.toml"
    return catalog.load_job(str(path), overrides=parse_overrides(assignments))[0]


def load_recipe(name: str, *assignments: str) -> Recipe:
    """Load a bundled recipe, whatever recipes the current folder has."""
    path = catalog.bundled_dir("recipes") / f"{name}.toml"
    return catalog.load_recipe(str(path), overrides=parse_overrides(assignments)).recipe


# What Table 2 leaves open, as the fact sheet settles it.
OPEN_IN_TABLE_2 = {
    "model.kwargs": {},
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "augment.crop_scale": (0.08, 1.0),
    "augment.crop_ratio": (3 / 4, 4 / 3),
    "augment.interpolation": "bicubic",
    "augment.erase_mode": "pixel",
    "augment.mix_prob": 1.0,
    "augment.mix_switch_prob": 0.5,
    "loss.target_threshold": 0.0,
    "loss.reduction": "mean",
    "optimizer.decay_norm_and_bias": False,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-6,
    "optimizer.momentum": 0.9,
    "optimizer.lamb_max_grad_norm": 1.0,
    "schedule.warmup_lr": 1e-4,
    "schedule.min_lr": 1e-6,
    "schedule.update": "epoch",
    "train.channels_last": True,
    "train.compile": False,
    "train.ema_warmup": False,
    "eval.interpolation": "bicubic",
    "eval.every_epochs": 1,
    "data.shuffle_samples": 4096,
    "data.shuffle_piece": 64,
    "data.max_bad_samples": 0,
    "data.make": "",
    "data.pipeline": "fast",
    "eval.exact": False,
    "train.deterministic": False,
    "optimizer.layer_decay": 1.0,
}
# The table gives these, but not entirely.
PARTLY_OPEN = {"train.virtual_ranks", "augment.rand_augment", "augment.repeats", "loss.targets", "train.amp"}


def put_recipe(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Copy a bundled recipe, changed, into a folder."""
    text = (RECIPES / "a1.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name
