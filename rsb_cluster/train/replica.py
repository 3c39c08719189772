"""This process's replica of the network, and all that a step changes in it: weights, optimizer, average, loss scale."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.global_batch import GlobalBatch, Share
from rsb_cluster.data.order import derive_seed
from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.run import InitialWeights, Spec
from rsb_cluster.storage.store import Store
from rsb_cluster.train.augment import Normalise, seed_everything
from rsb_cluster.train.batchnorm import RunningStatistics
from rsb_cluster.train.conversion.state_dict import fit_weights, parse
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.losses import criterion
from rsb_cluster.train.model import AMP_DTYPE, build_model
from rsb_cluster.train.optimizer import LearningRate, build_optimizer, load_optimizer
from rsb_cluster.train.recomputation import Recomputation
from rsb_cluster.train.shared_rank import SharedVirtualRank
from rsb_cluster.weights.resolve import WeightsFile

log = logging.getLogger(__name__)

# torch 2.15 renamed the argument.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}


class Replica:
    """A replica of the network, drawn from the run's seed; after `load`, if it resumes, `prepare` makes it ready.

    Args:
        spec: The run's spec.
        recipe: Its recipe.
        group: The processes.
        batch: How a global batch is divided.
        share: This process's share of it.
        peers: The processes that share its virtual rank; None if there are none.
        parts: Equal parts of a micro-batch that are computed one after the other (see `fit_micro_batch`).
        recompute: Whether gradient checkpointing is on.

    Attributes:
        model: The network.
        network: The same, compiled and in DDP as is needed.
        optimizer: Its optimizer.
        learning_rate: The schedule.
        ema: The moving average of the weights, if the recipe has one.
        scaler: The loss scale; disabled without fp16.
        statistics: BatchNorm's running statistics.
        normalise: From uint8 to the network's input.

    Raises:
        ConfigError: The GPU does not support the recipe's precision.
    """

    def __init__(
        self,
        spec: Spec,
        recipe: Recipe,
        group: ProcessGroup,
        batch: GlobalBatch,
        share: Share,
        peers: dist.ProcessGroup | None,
        *,
        parts: int = 1,
        recompute: bool = False,
    ) -> None:
        self._recipe, self._group, self._batch, self._share, self._peers = recipe, group, batch, share, peers
        self._parts, self._device = parts, group.device
        if recipe.train.amp == "bf16" and self._device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name()
            raise ConfigError(f"train.amp = 'bf16': {name} does not support it. Use --set train.amp=fp16.")
        seed_everything(derive_seed(spec.seed, 4))
        self.model = build_model(recipe).to(self._device)
        if recipe.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.network: nn.Module = self.model
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.learning_rate = LearningRate(recipe.schedule, recipe.optimizer.lr, recipe.steps_per_epoch)
        decay, warmup = recipe.train.ema_decay, recipe.train.ema_warmup
        self.ema = ModelEmaV3(self.model, decay=decay, use_warmup=warmup) if decay else None
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=recipe.train.amp == "fp16")
        self.statistics = RunningStatistics(self.model, spec.virtual_ranks, share.parts)
        self._recomputation = Recomputation(self.model, enabled=recompute)
        self._loss = criterion(recipe.loss)
        self.normalise = Normalise(
            recipe.data.mean, recipe.data.std, self._device, channels_last=recipe.train.channels_last
        )

    def state(self) -> dict[str, Any]:
        """Return the state dicts of all that a step changes, by name."""
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        return state

    def load(self, states: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        self.model.load_state_dict(states["model"])
        load_optimizer(self.optimizer, states["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(states["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(states["ema"])

    def load_initial_weights(self, folder: Store, init: InitialWeights) -> None:
        """Load the initial weights, from the same file on each rank; a new classifier is drawn from the seed."""
        found = WeightsFile(init.source, folder.url, init.file, init.sha256, init.architecture)
        taken = fit_weights(
            self.model, parse(found.read(), found), init.architecture, init.source, self._recipe.init.head
        )
        self.model.load_state_dict(taken.tensors)
        if self.ema is not None:
            self.ema.module.load_state_dict(taken.tensors)
        log.info(
            "starts from %s (SHA-256 %s); new: %s; resized: %s",
            init.source, init.sha256[:12], ", ".join(taken.new) or "nothing", ", ".join(taken.resized) or "nothing",
        )  # fmt: skip

    def prepare(self) -> None:
        """Compile the network and put it into DDP, as is needed, and rehearse a step."""
        network: nn.Module = self.model
        if compiles := self._recipe.train.compile:
            # Every micro-batch has one size, so no kernel need serve another.
            mode = "default" if compiles is True else compiles
            network = torch.compile(network, mode=mode, dynamic=False)  # type: ignore[assignment]
        self.network = network
        if self._group.world_size > 1:
            self.network = DistributedDataParallel(
                network,
                device_ids=[self._device.index] if self._device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **KEEP_BUFFERS,  # the statistics are averaged over virtual ranks instead
            )
        if self._group.world_size > 1 or self._parts > 1 or self._recipe.train.compile:
            self._rehearse()

    def _rehearse(self) -> None:
        """Run one forward and backward pass as in a step, and discard its gradients.

        DDP rebuilds its buckets after the first backward pass, and with them the order in which gradients are summed.
        With this rehearsal every step of every attempt sums in the same order, so a resume is bit-equal. And it
        compiles, for the size and memory format of the steps: for others, all would be compiled again.
        """
        side, size = self._recipe.augment.resolution, self._batch.images_at_once(self._group.world_size)
        images = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=self._device)
        self.statistics.begin_step()
        self.network.train()
        slots = self._share.slots[: size // self._parts]
        with self.autocast(), self._sharing(slots, checks=True):
            logits = self.network(self.normalise(images).chunk(self._parts)[0])
        (logits.float().sum() * 0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.restore()

    def autocast(self) -> Any:
        """Return the context of a forward pass, by the recipe's precision."""
        amp = self._recipe.train.amp
        return torch.autocast(self._device.type, dtype=AMP_DTYPE[amp], enabled=amp != "off")

    def _sharing(self, slots: Sequence[int], *, checks: bool = False) -> Any:
        """Return the context in which the network computes some images of a virtual rank; of no effect on all."""
        if len(slots) == self._batch.micro_batch:
            return contextlib.nullcontext()
        return SharedVirtualRank(slots, self._batch.micro_batch, self._peers, checks=checks)

    def _same_draws(self) -> Any:
        """Return the context that keeps the random generators as they are, for the next part of the micro-batch."""
        if self._parts == 1:
            return contextlib.nullcontext()
        return torch.random.fork_rng([self._device] if self._device.type == "cuda" else [])

    def begin_step(self) -> None:
        """Discard the gradients of the last step."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.begin_step()

    def add_gradients(
        self, images_BCHW: Tensor, shares_BK: Tensor, *, last: bool, forwarded: Callable[[], None]
    ) -> Tensor:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            images_BCHW: The images, mixed.
            shares_BK: The share of each class in each image.
            last: Whether it is this process's last of the step; gradients are then averaged over processes.
            forwarded: Called after the last forward pass of the step.

        Returns:
            The mean loss, on the device.
        """
        losses: list[Tensor] = []
        terms = self._parts * len(self._share.virtual_ranks)
        size = len(images_BCHW) // self._parts
        for number, (images, targets) in enumerate(zip(images_BCHW.split(size), shares_BK.split(size), strict=True)):
            ends = last and number == self._parts - 1
            slots = self._share.slots[number * size : (number + 1) * size]
            # Gradients are synchronised with the last of the last micro-batch only.
            no_sync = isinstance(self.network, DistributedDataParallel) and not ends
            with self.network.no_sync() if no_sync else contextlib.nullcontext():  # type: ignore[operator]
                with self.autocast(), self._same_draws(), self._sharing(slots):
                    logits = self.network(images)
                loss: Tensor = self._loss(logits, targets)
                losses.append(loss.detach())
                if ends:
                    forwarded()
                with self._recomputation.backward():
                    self.scaler.scale(loss if terms == 1 else loss / terms).backward()
        return losses[0] if self._parts == 1 else torch.stack(losses).mean()

    def update(self, step: int) -> None:
        """Update the weights by the gradients of a step, counted from 0."""
        rate = self.learning_rate.at(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
        limit = self._recipe.optimizer.clip_grad_norm
        if limit:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def average(self, step: int) -> None:
        """Update the moving average, if there is one, after a step, counted from 0."""
        if self.ema is not None:
            # timm counts updates from 1. Without a warm-up the decay is the same from the first step on.
            self.ema.update(self.model, step=step + 1 if self._recipe.train.ema_warmup else None)
