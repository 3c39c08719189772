"""Recipes: what to train, independent of the hardware.

A recipe is a TOML file in ``recipes/``; this module defines its fields and validates them. All fields are explicit, so
that a run's ``recipe.json`` holds everything that determines its result.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rsb_cluster.config import paper
from rsb_cluster.config.class_list import read_class_list
from rsb_cluster.config.schema import Count, Section
from rsb_cluster.errors import ConfigError, plural

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Interpolation = Literal["bicubic", "bilinear", "random"]
Procedure = Literal[
    "", "A1", "A2", "A3", "DeiT", "T2", "A1h", "A2-reg",
    "FT-CIFAR10", "FT-CIFAR100", "FT-Flowers102", "FT-Cars", "FT-iNat2019",
]  # fmt: skip

# Most images of a micro-batch where a recipe does not say: what the paper had on a GPU for ResNet-50.
USUAL_MICRO_BATCH = 512

# Fields that cannot change the result. Where the initial weights lie is one of them; what they contain is not.
METADATA_FIELDS: dict[str, Any] = {"description": True, "paper": True, "reconstruction": True, "init": {"weights"}}


class Model(Section):
    """The network, by its timm name."""

    name: str
    drop_rate: Fraction = Field(0.0, description="dropout before the classifier")
    drop_path_rate: Fraction = Field(0.0, description="stochastic depth; grows linearly with depth")
    kwargs: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class Init(Section):
    """The weights that training starts from."""

    weights: str = Field(
        "", description="a run, checkpoint, weights file, timm's folder or name (--init); empty: random"
    )
    head: Literal["auto", "replace"] = Field(
        "auto", description="the classifier; auto: new if the number of classes differs; replace: always new"
    )


class Data(Section):
    """The data set. Its location is given at submit (``--data``), not here."""

    set: str = Field(description="folder name under the data root; holds train/ and val/")
    num_classes: Count
    classes: tuple[str, ...] = Field(
        (), description="only these classes, numbered in this order: names, or a file with one a line; empty: all"
    )
    train_samples: Count = Field(description="images in train/; other counts are refused")
    val_samples: Count
    make: Literal["", "digits"] = Field("", description="data set that is made on the fly if it is missing")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pipeline: Literal["fast", "timm"] = Field(
        "fast", description="decoding and augmentation; fast: timm's random draws, pixels within a stated tolerance"
    )
    shuffle_samples: Count = Field(4096, description="size of a shuffle block, samples of a stream")
    shuffle_piece: Count = Field(64, description="consecutive samples of a shard that are read in one request")
    max_bad_samples: int = Field(0, ge=0, description="undecodable images that an epoch tolerates")

    @field_validator("classes", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Replace a file by its names: a run has the names, so that its id depends on them and not on the file."""
        return read_class_list(value) if isinstance(value, str) and value else value or ()

    @model_validator(mode="after")
    def _classes_are_counted(self) -> Data:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("data.classes names a class twice")
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(
                f"data.classes names {len(self.classes)} classes, and data.num_classes = {self.num_classes}. "
                f"Use --set data.num_classes={len(self.classes)}"
            )
        return self


class Augment(Section):
    """Augmentations of a training image, in this order."""

    resolution: Count = Field(description="side of the training crop, px")
    crop_scale: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="area of the random resized crop")
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    hflip: Fraction = 0.5
    rand_augment: str = Field("", description="timm's notation, for example rand-m7-mstd0.5-inc1; empty: none")
    color_jitter: NonNegative = 0.0
    erase_prob: Fraction = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    repeats: Count = Field(1, description="copies of an image in a global batch (repeated augmentation); 1: none")
    mixup: NonNegative = Field(0.0, description="alpha of Mixup's Beta distribution; 0: off")
    cutmix: NonNegative = Field(0.0, description="alpha of CutMix's Beta distribution; 0: off")
    mix_prob: Fraction = Field(1.0, description="share of micro-batches that are mixed")
    mix_switch_prob: Fraction = Field(0.5, description="share of CutMix where both are on")

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _from_small_to_large(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"augment.{info.field_name} = {value}: the first is above the second")
        return value


class Loss(Section):
    """The loss and its targets."""

    name: Literal["bce", "ce"]
    targets: Literal["paper", "soft", "timm", "deit"] = Field(
        "soft",
        description="paper: 1 for each class mixed in; soft: lambda-weighted, sum 1; timm: soft above a threshold; "
        "deit: soft above 0",
    )
    target_threshold: Fraction = Field(
        0.0, description="a class with a smaller or equal share is no positive; with targets = paper or timm"
    )
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reduction: Literal["mean", "sum"] = Field("mean", description="of BCE over classes; over images always the mean")

    @model_validator(mode="after")
    def _targets_fit(self) -> Loss:
        if self.name == "ce" and self.targets != "soft":
            raise ValueError(f"loss.targets = '{self.targets}' is for BCE; cross-entropy takes 'soft'")
        if self.target_threshold and self.targets not in ("paper", "timm"):
            raise ValueError("loss.target_threshold has no effect unless loss.targets = 'paper' or 'timm'")
        if self.targets == "deit" and self.smoothing:
            raise ValueError(
                "loss.targets = 'deit' with smoothing makes every class a positive (the off-value is above 0). "
                "Use smoothing = 0 or targets = 'paper'"
            )
        return self


class Optimizer(Section):
    """The optimizer, by its timm name."""

    name: Literal["lamb", "adamw", "sgd"]
    lr: Positive = Field(description="peak learning rate, for the whole global batch")
    weight_decay: NonNegative
    decay_norm_and_bias: bool = Field(False, description="whether BN weights and biases decay too")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-6
    momentum: Fraction = Field(0.9, description="momentum of SGD (Nesterov)")
    lamb_max_grad_norm: NonNegative = Field(1.0, description="LAMB's own clip of the global gradient norm; 0: off")
    clip_grad_norm: NonNegative = Field(0.0, description="clip before the optimizer; 0: off")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor of the learning rate from a layer to the one before it, for fine-tuning; 1: off"
    )


class Schedule(Section):
    """The learning rate schedule."""

    name: Literal["cosine"] = "cosine"
    epochs: Count
    warmup_epochs: int = Field(0, ge=0)
    warmup_lr: NonNegative = 0.0
    min_lr: NonNegative = 0.0
    update: Literal["epoch", "step"] = Field("step", description="when the learning rate is updated")


class Train(Section):
    """Batches and numerics."""

    global_batch: Count = Field(description="images in one optimizer step, copies included")
    virtual_ranks: int = Field(
        0,
        ge=0,
        description='micro-batches of a step, each with one lambda and its own BatchNorm statistics; "paper": the '
        "number of GPUs in Table 3; 0: the fewest of at most 512 images",
    )
    amp: Literal["off", "fp16", "bf16"] = "off"
    channels_last: bool = False
    compile: bool | Literal["max-autotune", "reduce-overhead"] = Field(
        False, description="torch.compile, and its mode; true (or default): torch's default mode"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the weights' EMA; 0: off")
    deterministic: bool = Field(
        False, description="only kernels that give the same bits each time: a run on the same GPUs is bit-equal; slower"
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _default_mode(cls, value: Any) -> Any:
        """Replace the name of the default mode by what earlier recipes say, as a run's id depends on it."""
        return True if value == "default" else value

    ema_warmup: bool = Field(
        False, description="the EMA's decay rises from 0, as with timm's --model-ema-warmup: 1 - (1 + step)^(-2/3)"
    )


class Eval(Section):
    """Evaluation of the last weights on val/."""

    resolution: Count
    crop: Annotated[float, Field(gt=0, le=1)]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    exact: bool = Field(False, description="decode and resize with PIL, bit for bit as timm does")
    every_epochs: Count = 1


class Recipe(Section):
    """What to train; see the sections for the fields."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    paper: Procedure = Field("", description="the published procedure that the recipe implements")
    reconstruction: bool = Field(
        False, description="the procedure's values are not public, these are ours: no match is called a reproduction"
    )
    model: Model
    init: Init = Init()
    data: Data
    augment: Augment
    loss: Loss
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    eval: Eval

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return bool(self.augment.mixup or self.augment.cutmix)

    def with_virtual_ranks(self) -> Recipe:
        """Return the recipe with a number of virtual ranks, if it has none.

        It is the paper's, or else the smallest with which a micro-batch has at most 512 images, and the copies of an
        image are in different micro-batches where that is possible: a matter of the recipe alone, and not of the job.

        Raises:
            ConfigError: There is no such number.
        """
        if self.train.virtual_ranks:
            return self
        batch, setup = self.train.global_batch, paper.setup_of(self.paper, self.model.name)
        if setup and batch % setup.gpus == 0:
            return self._with(setup.gpus)
        for fewest in (min(self.augment.repeats, batch), 1):
            for number in range(fewest, batch + 1):
                size, rest = divmod(batch, number)
                if not rest and size <= USUAL_MICRO_BATCH and not (self.mixes and size % 2):
                    return self._with(number)
        raise ConfigError(
            f"train.global_batch = {batch} cannot be split into micro-batches of an even number of images, as Mixup "
            "and CutMix need. Use an even batch."
        )

    def _with(self, virtual_ranks: int) -> Recipe:
        return self.model_copy(update={"train": self.train.model_copy(update={"virtual_ranks": virtual_ranks})})

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the remainder that does not fill a global batch is dropped."""
        return self.data.train_samples // self.train.global_batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.schedule.epochs

    @model_validator(mode="before")
    @classmethod
    def _virtual_ranks_of_the_paper(cls, values: Any) -> Any:
        """Replace "paper" by the number of Table 3, so a run has the number."""
        match values:
            case {"paper": procedure, "model": {"name": str(model)}, "train": {"virtual_ranks": "paper"} as train}:
                if procedure not in paper.TABLE3_PROCEDURES:
                    raise ValueError(
                        "train.virtual_ranks = 'paper' is a number of GPUs in the paper's Table 3, which has a1, a2 "
                        "and a3 only. Use a number"
                    )
                setup = paper.setup_of(procedure, model)
                number = setup.gpus if setup else paper.OTHER_VIRTUAL_RANKS
                return {**values, "train": {**train, "virtual_ranks": number}}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.data.train_samples < self.train.global_batch:
            raise ValueError(
                f"data.train_samples = {self.data.train_samples} is less than one global batch "
                f"(train.global_batch = {self.train.global_batch}); lower the batch"
            )
        if self.schedule.warmup_epochs >= self.schedule.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs} leaves nothing of "
                f"schedule.epochs = {self.schedule.epochs}"
            )
        if self.train.deterministic and self.train.compile:
            raise ValueError(
                "train.deterministic: the compiler chooses kernels by their time, so a resumed run may have others. "
                "Use train.compile = false"
            )
        if self.augment.repeats > 1 and self.train.global_batch < self.augment.repeats:
            raise ValueError("train.global_batch is smaller than augment.repeats")
        self._check_virtual_ranks()
        return self

    def _check_virtual_ranks(self) -> None:
        """Refuse micro-batches that are not equal, or that cannot be mixed in pairs."""
        batch, number = self.train.global_batch, self.train.virtual_ranks
        if not number:
            return
        if batch % number:
            below = batch // number * number
            options = [str(b) for b in (below, below + number) if b]
            raise ValueError(
                f"train.global_batch = {batch} is not divisible by train.virtual_ranks = {number}. Use a batch of "
                f"{' or '.join(options)}, or other --virtual-ranks"
            )
        if self.mixes and batch // number % 2:
            raise ValueError(
                f"a micro-batch has {plural(batch // number, 'image')} ({batch} / {number} virtual ranks), but Mixup "
                "and CutMix mix pairs and need an even number. Use other --virtual-ranks"
            )

    def digest(self, seed: int, data_digest: str, init_digest: str = "", draws: int = 1) -> str:
        """Return a digest (8 hex digits) of everything that can change the result.

        Fields at their default are left out, so that a later version can add a field without changing the digest of
        every unfinished run.

        Args:
            seed: The run's seed.
            data_digest: Digest of the data.
            init_digest: SHA-256 of the initial weights; empty for random ones.
            draws: Version of the order of samples and of all draws (``data.order.DRAWS``).
        """
        science = self.model_dump(exclude_defaults=True, exclude={"name": True, **METADATA_FIELDS}, mode="json")
        rest = [*([init_digest] if init_digest else []), *([draws] if draws != 1 else [])]
        text = json.dumps([science, seed, data_digest, *rest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def earlier_digests(self, seed: int, data_digest: str, init_digest: str, draws: int) -> list[str]:
        """Return the digests that earlier versions gave to runs of this recipe, the newest first.

        Their number of virtual ranks was in the recipe, or was chosen at submit and in the run's spec alone.

        Args:
            seed: As in ``digest``.
            data_digest: Likewise.
            init_digest: Likewise.
            draws: The present version of the draws.
        """
        recipes = (self, self._with(0))
        return [r.digest(seed, data_digest, init_digest, n) for n in range(draws - 1, 0, -1) for r in recipes]
