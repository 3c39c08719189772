"""The training loop: steps over global batches, evaluation, saving, and stopping on request.

A global batch is V micro-batches, one per virtual rank. Each of W processes accumulates the gradients of V/W of them;
DDP averages over processes. All randomness is seeded per sample and per micro-batch, so nothing depends on W.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.index import load_index
from rsb_cluster.data.order import derive_seed
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.errors import ConfigError, DataError, RsbError
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Cause, InitialWeights, Run, Spec
from rsb_cluster.storage.store import Store
from rsb_cluster.train.augment import EvalTransform, Mix, Normalise, TrainTransform, seed_everything, seed_micro_batch
from rsb_cluster.train.batchnorm import RunningStatistics
from rsb_cluster.train.conversion.state_dict import fit_weights, parse
from rsb_cluster.train.distributed import ProcessGroup, lost_peer_errors
from rsb_cluster.train.exchange import RankReport, StepExchange, StepReport
from rsb_cluster.train.input.loader import Batch, ThreadedBatches, process_batches
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain
from rsb_cluster.train.input.streams import EvalStream, TrainStream
from rsb_cluster.train.losses import criterion
from rsb_cluster.train.model import AMP_DTYPE, build_model
from rsb_cluster.train.optimizer import LearningRate, build_optimizer
from rsb_cluster.train.samples import SampleLog
from rsb_cluster.train.saver import Saver, SaveTooSlowError
from rsb_cluster.train.state import Progress, from_files
from rsb_cluster.train.validation.validate import EvaluationStopped, Score, compute_score, predict_logits
from rsb_cluster.train.watchdog import Watchdog
from rsb_cluster.weights.resolve import WeightsFile

log = logging.getLogger(__name__)

# torch 2.15 renamed the argument.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}


class DivergedError(RsbError):
    """The loss is not finite."""


class Trainer:
    """One attempt's training.

    Args:
        run: The run.
        spec: Its spec.
        recipe: Its recipe.
        job: The job.
        group: The processes of this attempt.
        flag: The stop flag of this rank.
        watchdog: The watchdog of this rank.
        lease: The attempt; on rank 0 only.

    Attributes:
        message: Details of the end, besides its cause.
    """

    def __init__(
        self,
        run: Run,
        spec: Spec,
        recipe: Recipe,
        job: Job,
        group: ProcessGroup,
        flag: StopFlag,
        watchdog: Watchdog,
        lease: Lease | None,
    ) -> None:
        self.recipe, self.job, self.group, self.flag = recipe, job, group, flag
        self.spec, self.watchdog, self.message = spec, watchdog, ""
        self.device = group.device
        self.progress = Progress()
        per_process = spec.virtual_ranks // group.world_size
        self.local_virtual_ranks = range(group.rank * per_process, (group.rank + 1) * per_process)
        self._open_data()
        self._build()
        self.saver = Saver(run.store, job.checkpoint, lease, self.device) if lease is not None else None
        self._load(run, lease)
        self._samples = SampleLog(run.store, group, lease) if job.log_samples else None
        self.exchange = StepExchange(group, self.statistics)
        self._interval_started, self._interval_steps = time.monotonic(), 0

    # --- setting up ---------------------------------------------------------------------------------------------

    def _open_data(self) -> None:
        root = Store(self.spec.data)
        self._train_store, self._val_store = root.child("train"), root.child("val")
        try:
            self.train_index, self.val_index = load_index(self._train_store), load_index(self._val_store)
        except DataError as error:
            raise DataError(f"{error}\nIf the shards were moved, submit the run again with --data.") from error
        limit = int(self.job.cache_gb * 1e9)
        self._cache = ShardCache(Path(self.job.cache_dir), limit) if self.job.cache_dir else None
        self._reader = ShardReader(self._train_store, self.train_index, cache=self._cache)
        self._bytes_seen, self._attempt_bytes = 0, 0.0
        for name, index, digest in (
            ("train", self.train_index, self.spec.train_digest),
            ("val", self.val_index, self.spec.val_digest),
        ):
            if index.digest != digest:
                raise DataError(
                    f"{self.spec.data}/{name} was indexed again since this run was submitted: its samples may have "
                    "changed. Restore the old shards, or submit again to start a new run."
                )

    def _build(self) -> None:
        recipe = self.recipe
        if recipe.train.amp == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name()
            raise ConfigError(f"train.amp = 'bf16': {name} does not support it. Use --set train.amp=fp16.")
        torch.backends.cudnn.benchmark = True
        seed_everything(derive_seed(self.spec.seed, 4))
        self.model = build_model(recipe).to(self.device)
        if recipe.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.learning_rate = LearningRate(recipe.schedule, recipe.optimizer.lr, recipe.steps_per_epoch)
        self.ema = ModelEmaV3(self.model, decay=recipe.train.ema_decay) if recipe.train.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.train.amp == "fp16")
        self.statistics = RunningStatistics(self.model, self.spec.virtual_ranks)
        self.loss = criterion(recipe.loss)
        self.normalise = Normalise(
            recipe.data.mean, recipe.data.std, self.device, channels_last=recipe.train.channels_last
        )
        self.mix = Mix(recipe, self.device)

    def _load(self, run: Run, lease: Lease | None) -> None:
        """Resume from the newest valid checkpoint, the same on every rank; else load the initial weights, if any."""
        folder = run.store.child("checkpoints")
        found = checkpoint.read_latest(folder, lease.starts) if lease is not None else None
        name = self.group.broadcast("resume", found.saved.folder if found else "")
        if saved := checkpoint.CheckpointId.of(name):
            found = found or checkpoint.read(folder, saved)
            self.progress, states = from_files(found, self.device)
            if not self.progress.scores:
                self.progress.evaluated_step = 0  # the result needs scores, so the last evaluation is repeated
            self.model.load_state_dict(states["model"])
            self.optimizer.load_state_dict(states["optimizer"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(states["scaler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(states["ema"])
        elif self.spec.init is not None:
            self._load_initial_weights(run.init, self.spec.init)
        network: nn.Module = self.model
        if self.recipe.train.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        self.network: nn.Module = network
        if self.group.world_size > 1:
            self.network = DistributedDataParallel(
                network,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_KEEP_BUFFERS,  # the statistics are averaged over virtual ranks instead
            )
            self._warm_up_ddp()

    def _load_initial_weights(self, folder: Store, init: InitialWeights) -> None:
        """Load the initial weights, from the same file on each rank; a new classifier is drawn from the seed."""
        found = WeightsFile(init.source, folder.url, init.file, init.sha256, init.architecture)
        taken = fit_weights(
            self.model, parse(found.read(), found), init.architecture, init.source, self.recipe.init.head
        )
        self.model.load_state_dict(taken.tensors)
        if self.ema is not None:
            self.ema.module.load_state_dict(taken.tensors)
        log.info(
            "starts from %s (SHA-256 %s); new: %s; resized: %s",
            init.source, init.sha256[:12], ", ".join(taken.new) or "nothing", ", ".join(taken.resized) or "nothing",
        )  # fmt: skip

    def _warm_up_ddp(self) -> None:
        """Run one backward pass and discard its gradients.

        DDP rebuilds its buckets after the first backward pass, and with them the order in which gradients are summed.
        With this warm-up every step of every attempt sums in the same order, so a resume is bit-equal.
        """
        size = self.recipe.augment.resolution
        images = torch.zeros(2, 3, size, size, device=self.device)
        self.statistics.begin_step()
        self.network.train()
        with self._autocast():
            logits = self.network(images)
        (logits.float().sum() * 0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.restore()

    def _autocast(self) -> Any:
        amp = self.recipe.train.amp
        return torch.autocast(self.device.type, dtype=AMP_DTYPE[amp], enabled=amp != "off")

    @property
    def scores(self) -> dict[str, Score]:
        """Scores of the last evaluation, by prefix: ``""`` for the model, and ``"ema_"`` for its moving average."""
        return {prefix: Score(**score) for prefix, score in self.progress.scores.items()}

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> Cause:
        """Train until the run is finished or a stop is requested; save the state, and return the cause of the end."""
        total, per_epoch = self.recipe.total_steps, self.recipe.steps_per_epoch
        stream = TrainStream(
            self._reader,
            self.recipe,
            self.train_index,
            seed=self.spec.seed,
            virtual_ranks=self.spec.virtual_ranks,
            local_virtual_ranks=self.local_virtual_ranks,
            start_step=self.progress.step,
            stop_step=total,
        )
        self._log_start(stream)
        self._first_step = self.progress.step
        cause = self._evaluate_if_due()
        early: Cause | None = None
        late: RsbError | None = None
        source = iter(self._batches(stream))
        while cause is None and self.progress.step < total:
            with lost_peer_errors():
                self._step(source)
            if late is not None:
                raise late
            if self.saver is not None and self.progress.step == self._first_step + 1:
                self.saver.prepare(self._states())  # now the optimizer has its state
            at_epoch_end = self.progress.step % per_epoch == 0
            cause = self._process_reports(self.exchange.take(all_=at_epoch_end)) or early
            early = None
            if self.progress.step % self.job.log_every_steps == 0 or at_epoch_end:
                cause = self._process_reports(self.exchange.take(all_=True)) or cause
                self._log_train()
            if at_epoch_end:
                self.progress.bad_samples = 0
                cause = cause or self._evaluate_if_due()
            continues = cause is None and self.progress.step < total
            if continues and self.saver is not None and self.saver.is_due(self.progress.step):
                # On rank 0 only. On a GPU the other ranks read this step's reports one step later, and all ranks must
                # leave the loop after the same step, so rank 0 acts on these reports in the next step, too. What it
                # would raise now, the others raise then; and a state with such a step in it is not saved.
                try:
                    early = self._process_reports(self.exchange.take(all_=True))
                except (DivergedError, DataError) as error:
                    late = error
                else:
                    self.saver.save(self.progress, self._states())
        return self._finish(cause)

    def _finish(self, cause: Cause | None) -> Cause:
        cause = self._process_reports(self.exchange.take(all_=True)) or cause
        done = self.progress.step == self.recipe.total_steps == self.progress.evaluated_step
        end: Cause = "finished" if done else (cause or "finished")
        self.watchdog.progress(self.progress.step, "saving")
        if self.saver is not None and end != "superseded":
            log.info("%s after step %d: saving", end, self.progress.step)
            budget = {"preempted": self.job.grace_s, "timed out": self.job.signal_delay_s}.get(end, 0)
            try:
                self.saver.save_last(self.progress, self._states(), within_s=self.flag.save_time_s(budget))
                self.saver.close()
            except SaveTooSlowError as error:
                self.message = str(error)
                log.error("%s", error)
        return end

    def _step(self, source: Iterator[Batch]) -> None:
        """Do one optimizer step over this process's share of a global batch."""
        started, waited, bad = time.monotonic(), 0.0, 0
        step, share = self.progress.step, len(self.local_virtual_ranks)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.begin_step()
        loss_sum = torch.zeros((), device=self.device)
        for virtual_rank in self.local_virtual_ranks:
            wait_started = time.monotonic()
            self.watchdog.progress(step, "waiting for data")
            batch = next(source)
            self.watchdog.progress(step, "computing")
            waited += time.monotonic() - wait_started
            bad += self._report_bad(batch)
            loss_sum += self._micro_batch(batch, step, virtual_rank, last=virtual_rank == self.local_virtual_ranks[-1])
            self.statistics.end_micro_batch()
        rate = self.learning_rate.at(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        read, self._bytes_seen = self._reader.bytes_read - self._bytes_seen, self._reader.bytes_read
        self.exchange.post(self.flag.to_vector(), RankReport(bad, waited, read), loss_sum / share)
        if self.ema is not None:
            self.ema.update(self.model)
        self.progress.step += 1
        self.progress.train_s += time.monotonic() - started
        self._interval_steps += 1

    def _micro_batch(self, batch: Batch, step: int, virtual_rank: int, *, last: bool) -> torch.Tensor:
        """Do the forward and backward pass of one micro-batch, and return its loss, on the device."""
        seed_micro_batch(self.spec.seed, step, virtual_rank)
        images = self.normalise(batch.images.to(self.device, non_blocking=True))
        images, shares = self.mix(images, batch.labels.to(self.device, non_blocking=True))
        if self._samples is not None:
            self._samples.add(step, virtual_rank, batch, shares)
        # Gradients are synchronised with the last micro-batch only.
        no_sync = isinstance(self.network, DistributedDataParallel) and not last
        with self.network.no_sync() if no_sync else contextlib.nullcontext():  # type: ignore[operator]
            with self._autocast():
                logits = self.network(images)
            loss: torch.Tensor = self.loss(logits, shares)
            self.scaler.scale(loss / len(self.local_virtual_ranks)).backward()
        return loss.detach()

    def _clip(self) -> None:
        limit = self.recipe.optimizer.clip_grad_norm
        if limit:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def _report_bad(self, batch: Batch) -> int:
        for name in batch.bad:
            log.warning("cannot decode %s (in %s)", name, self._train_store.url)
        return len(batch.bad)

    def _process_reports(self, reports: list[StepReport]) -> Cause | None:
        """Add the reports of some steps to the progress; return why to stop, if a rank requests it."""
        cause = None
        for report in reports:
            self.progress.bad_samples += report.bad
            self.progress.interval_loss += report.loss
            self.progress.interval_wait_s += report.data_wait_s
            self.progress.interval_steps += 1
            self.progress.interval_bytes += report.bytes_read
            self._attempt_bytes += report.bytes_read
            cause = cause or self.flag.agree(report.flags)
            if not math.isfinite(report.loss):
                raise DivergedError(
                    f"the loss became {report.loss} near step {self.progress.step}; the last checkpoint is older. "
                    "Lower optimizer.lr, or use --set train.amp=bf16 (or off) if half precision overflows."
                )
        limit = self.recipe.data.max_bad_samples
        if self.progress.bad_samples > limit:
            raise DataError(
                f"{self.progress.bad_samples} images of this epoch cannot be decoded, data.max_bad_samples allows "
                f"{limit}. Their names are in the ranks' logs ('rsb-cluster logs'); fix them, or raise the limit."
            )
        return cause

    # --- evaluation and reporting -------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> Cause | None:
        """Evaluate at the end of an epoch if the recipe says so, unless this step is already evaluated."""
        step, per_epoch = self.progress.step, self.recipe.steps_per_epoch
        epoch = step // per_epoch
        due = step % per_epoch == 0 and epoch % self.recipe.eval.every_epochs == 0
        if not step or self.progress.evaluated_step == step or not (due or step == self.recipe.total_steps):
            return None
        try:
            with lost_peer_errors():
                scores = {"": self._evaluate(self.model)}
                if self.ema is not None:
                    scores["ema_"] = self._evaluate(self.ema.module)
        except EvaluationStopped as stopped:
            return stopped.cause
        self.progress.evaluated_step = step
        self.progress.scores = {prefix: asdict(score) for prefix, score in scores.items()}
        is_best = scores[""].top1 > self.progress.best_top1
        if is_best:
            self.progress.best_top1, self.progress.best_step = scores[""].top1, step
        row: dict[str, Any] = {"kind": "eval", "step": step, "epoch": epoch, "time": time.time()}
        for prefix, score in scores.items():
            row |= {f"{prefix}{k}": v for k, v in vars(score).items()}
        if self.saver is not None:
            self.saver.metrics.add(row)
            self.saver.flush_metrics()
            if is_best and step < self.recipe.total_steps:
                self.saver.save(self.progress, self._states())
        score = scores[""]
        log.info(
            "epoch %d: top-1 %.2f %%, top-5 %.2f %%, loss %.4f on %d images",
            epoch, score.top1, score.top5, score.loss, score.samples,
        )  # fmt: skip
        self._interval_started, self._interval_steps = time.monotonic(), 0
        return None

    def _evaluate(self, model: nn.Module) -> Score:
        reader = ShardReader(self._val_store, self.val_index, cache=self._cache)
        size = self.recipe.train.global_batch // self.spec.virtual_ranks
        stream = EvalStream(
            reader, self.val_index, rank=self.group.rank, world_size=self.group.world_size, batch=max(size, 64)
        )
        outputs = predict_logits(
            model,
            self._batches(stream),
            stream,
            device=self.device,
            normalise=self.normalise,
            autocast=self._autocast,
            agree=self._agree_on_stop,
        )
        return compute_score(outputs, total=self.val_index.num_samples, group=self.group)

    def _batches(self, stream: TrainStream | EvalStream) -> Iterable[Batch]:
        """Return a stream's batches, by the recipe's pipeline."""
        recipe, workers, pin = self.recipe, self.job.loader_workers, self.device.type == "cuda"
        training = isinstance(stream, TrainStream)
        if recipe.data.pipeline == "timm":
            stock = TrainTransform(recipe) if training else EvalTransform(recipe.eval)
            return process_batches(stream, stock, workers=workers, pin=pin)
        fast = FastTrain(recipe) if training else FastEval(recipe.eval)
        side = recipe.augment.resolution if training else recipe.eval.resolution
        return ThreadedBatches(stream, fast, side=side, threads=workers, pin=pin)

    def _agree_on_stop(self) -> Cause | None:
        self.watchdog.progress(self.progress.step, "evaluating")
        vector = torch.tensor(self.flag.to_vector(), device=self.device)
        return self.flag.agree(self.group.sum_(vector).tolist())

    def _log_train(self) -> None:
        p = self.progress
        steps = max(1, p.interval_steps)
        seconds = max(1e-9, time.monotonic() - self._interval_started)
        images_per_s = self._interval_steps * self.recipe.train.global_batch / seconds
        row = {
            "kind": "train",
            "step": p.step,
            "epoch": p.step / self.recipe.steps_per_epoch,
            "loss": p.interval_loss / steps,
            "lr": self.learning_rate.at(p.step - 1),
            "images_per_s": images_per_s,
            "data_wait_s": p.interval_wait_s / steps,
            "bytes_read": round(p.interval_bytes / steps),
            "read_amplification": self._attempt_bytes / max(1.0, self._needed_bytes()),
            "bad_samples": p.bad_samples,
            "time": time.time(),
        }
        if self.saver is not None:
            self.saver.metrics.add(row)
            self.saver.flush_metrics(every_s=5.0)
            left = (self.recipe.total_steps - p.step) * self.recipe.train.global_batch / max(images_per_s, 1e-9)
            log.info(
                "step %d/%d epoch %.2f loss %.5f lr %.2e %.0f images/s, %.0f %% waiting for data, ETA %s",
                p.step, self.recipe.total_steps, row["epoch"], row["loss"], row["lr"], images_per_s,
                100 * p.interval_wait_s / seconds, datetime.timedelta(seconds=round(left)),
            )  # fmt: skip
        p.interval_loss, p.interval_wait_s, p.interval_bytes, p.interval_steps = 0.0, 0.0, 0.0, 0
        self._interval_started, self._interval_steps = time.monotonic(), 0

    def _needed_bytes(self) -> float:
        """Return the bytes of the distinct images of this attempt's steps."""
        images = (self.progress.step - self._first_step) * self.recipe.train.global_batch / self.recipe.augment.repeats
        return images * float(self.train_index.image_sizes.mean())

    def _log_start(self, stream: TrainStream) -> None:
        recipe, spec = self.recipe, self.spec
        order = stream.epoch_order(self.progress.step // recipe.steps_per_epoch)
        log.info(
            "step %d of %d (%d epochs of %d); %d virtual ranks × %d images on %d processes; %s on %s; "
            "%d samples that do not fill a global batch are dropped per epoch",
            self.progress.step, recipe.total_steps, recipe.schedule.epochs, recipe.steps_per_epoch,
            spec.virtual_ranks, order.micro_batch, self.group.world_size, recipe.model.name, self.device, order.dropped,
        )  # fmt: skip

    def _states(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        return state
