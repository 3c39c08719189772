"""The training loop: steps over global batches, evaluation, saving, and stopping on request.

A global batch is V micro-batches, one per virtual rank. Each of W processes accumulates the gradients of V/W of them,
or W/V processes share each (``train.shared_rank``); DDP averages over processes. All randomness is seeded per sample
and per micro-batch, so nothing depends on W.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.global_batch import GlobalBatch, hosts_of_parts, places_by_host
from rsb_cluster.errors import DataError, RsbError
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Cause, Run, Spec
from rsb_cluster.train.augment import Mix, seed_micro_batch
from rsb_cluster.train.data_wait import DataWait
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.divergence import DivergedError, RecentBatches, explain, last_good_checkpoint
from rsb_cluster.train.exchange import RankReport, StepExchange, StepReport, StopVote
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches
from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.input.to_device import CudaSide, OnDevice, ToDevice
from rsb_cluster.train.lost_peer import lost_peer_errors
from rsb_cluster.train.profiling import StepProfiler
from rsb_cluster.train.replica import Replica
from rsb_cluster.train.run_data import RunData
from rsb_cluster.train.samples import SampleLog
from rsb_cluster.train.saver import Saver, SaveTooSlowError
from rsb_cluster.train.state import Progress, from_files
from rsb_cluster.train.telemetry import Telemetry
from rsb_cluster.train.train_log import TrainLog
from rsb_cluster.train.validation.validate import EvaluationStopped, Score, compute_score, predict_logits
from rsb_cluster.train.watchdog import Watchdog

log = logging.getLogger(__name__)


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
        decoders: Forks the processes that decode; None: images are decoded in this process.
        parts: Equal parts of a micro-batch that are computed one after the other (see `fit_micro_batch`).

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
        decoders: DecoderServer | None = None,
        parts: int = 1,
    ) -> None:
        self.recipe, self.job, self.group, self.flag = recipe, job, group, flag
        self.spec, self.watchdog, self.message = spec, watchdog, ""
        self.device = group.device
        self.progress = Progress()
        self.batch = GlobalBatch.of(recipe, spec.virtual_ranks, recomputes=job.gradient_checkpointing)
        self._join_virtual_rank()
        self.data = RunData(spec, recipe, job, group, self._shares, decoders)
        self.replica = Replica(
            spec, recipe, group, self.batch, self.share, self._peers,
            parts=parts, recompute=job.gradient_checkpointing,
        )  # fmt: skip
        self.mix = Mix(recipe, self.device, () if self.share.is_whole else self.share.slots, self.batch.micro_batch)
        self._lease = lease
        self.saver = Saver(run.store, job.checkpoint, lease, self.device) if lease is not None else None
        self._load(run, lease)
        self._samples = SampleLog(run.store, group, lease) if job.log_samples else None
        self.exchange = StepExchange(group, self.replica.statistics)
        self._data_wait = DataWait(self.device)
        self._profiler = StepProfiler(job.profile_steps, run.store, group)
        self._telemetry = Telemetry(group)
        self._folder, self._recent = run.store, RecentBatches(run.store, group.rank, self.data.train_index)
        self._reported_step = self.progress.step
        self._log = TrainLog(recipe, self.data, self._telemetry, self.saver, self.progress.step)

    # --- setting up ---------------------------------------------------------------------------------------------

    def _join_virtual_rank(self) -> None:
        """Find this process's share of each global batch, and the processes that share its virtual rank."""
        world, hosts = self.group.world_size, self.group.hosts
        parts = self.batch.parts(world)
        places = places_by_host(hosts, parts)
        self._shares = [self.batch.share(place, world) for place in places]
        self.share = self._shares[self.group.rank]
        self.local_virtual_ranks = self.share.virtual_ranks
        self._peers: dist.ProcessGroup | None = None
        if parts == 1:
            return
        by_place = sorted(range(world), key=lambda rank: places[rank])
        self._peers = self.group.split([by_place[start : start + parts] for start in range(0, world, parts)])
        if split := [names for names in hosts_of_parts(hosts, places, parts) if len(names) > 1]:
            log.warning(
                "%d of %d virtual ranks are shared by processes of several hosts, such as %s: BatchNorm's statistics "
                "cross the network in each layer. Nodes with a multiple of %d GPUs avoid it.",
                len(split), self.spec.virtual_ranks, ", ".join(sorted(split[0])), parts,
            )  # fmt: skip

    def _load(self, run: Run, lease: Lease | None) -> None:
        """Resume from the newest valid checkpoint, the same on every rank; else load the initial weights, if any."""
        folder = run.store.child("checkpoints")
        found = checkpoint.read_latest(folder, lease.starts) if lease is not None else None
        name = self.group.broadcast("resume", found.saved.folder if found else "")
        if saved := checkpoint.CheckpointId.of(name):
            found = found or checkpoint.read(folder, saved)
            self.progress, states = from_files(found)
            if not self.progress.scores:
                self.progress.evaluated_step = 0  # the result needs scores, so the last evaluation is repeated
            self.replica.load(states)
        elif self.spec.init is not None:
            self.replica.load_initial_weights(run.init, self.spec.init)
        self.replica.prepare()

    @property
    def scores(self) -> dict[str, Score]:
        """Scores of the last evaluation, by prefix: ``""`` for the model, and ``"ema_"`` for its moving average."""
        return {prefix: Score(**score) for prefix, score in self.progress.scores.items()}

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> Cause:
        """Train until the run is finished or a stop is requested; save the state, and return the cause of the end."""
        total, per_epoch = self.recipe.total_steps, self.recipe.steps_per_epoch
        stream = self.data.train_stream(self.progress.step)
        self._log.start(stream, self.spec, self.job, self.group, self.progress.step, self.share.parts)
        self._first_step = self.progress.step
        batches = self.data.batches(stream)
        cause = self._evaluate_if_due()
        early: Cause | None = None
        late: RsbError | None = None
        ready = batches.ready if isinstance(batches, ProcessBatches) else lambda: False
        side = CudaSide() if self.device.type == "cuda" else None
        source = ToDevice(iter(batches), ready, self.device, self.replica.normalise, side)
        while cause is None and self.progress.step < total:
            with lost_peer_errors(), self._profiler.step(self.progress.step + 1):
                self._step(source)
            if late is not None:
                raise late
            if self.saver is not None and self.progress.step == self._first_step + 1:
                self.saver.prepare(self.replica.state())  # now the optimizer has its state
            at_epoch_end = self.progress.step % per_epoch == 0
            logs = at_epoch_end or self.progress.step % self.job.log_every_steps == 0
            cause = self._take_reports(all_=logs) or early
            self._telemetry.end_step()
            early = None
            if logs:
                self._log.end_interval(self.progress, self.replica.learning_rate.at(self.progress.step - 1))
            if at_epoch_end:
                self.progress.bad_samples = 0
                cause = cause or self._evaluate_if_due()
            continues = cause is None and self.progress.step < total
            if continues and self.saver is not None and self.saver.is_due(self.progress.step):
                # On rank 0 only. On a GPU the other ranks read this step's reports one step later, and all ranks must
                # leave the loop after the same step, so rank 0 acts on these reports in the next step, too. What it
                # would raise now, the others raise then; and a state with such a step in it is not saved.
                try:
                    early = self._take_reports(all_=True)
                except (DivergedError, DataError) as error:
                    late = error
                else:
                    self.saver.save(self.progress, self.replica.state())
        return self._finish(cause)

    def _finish(self, cause: Cause | None) -> Cause:
        self._profiler.close()
        self._telemetry.close()
        cause = self._take_reports(all_=True) or cause
        done = self.progress.step == self.recipe.total_steps == self.progress.evaluated_step
        end: Cause = "finished" if done else (cause or "finished")
        self.watchdog.progress(self.progress.step, "saving")
        if self.saver is not None and end != "superseded":
            log.info("%s after step %d: saving", end, self.progress.step)
            budget = {"preempted": self.job.grace_s, "timed out": self.job.signal_delay_s}.get(end, 0)
            try:
                self.saver.save_last(self.progress, self.replica.state(), within_s=self.flag.save_time_s(budget))
                self.saver.close()
            except SaveTooSlowError as error:
                self.message = str(error)
                log.error("%s", error)
        return end

    def _step(self, source: ToDevice) -> None:
        """Do one optimizer step over this process's share of a global batch."""
        started, bad = time.monotonic(), 0
        self._telemetry.begin_step()
        step, share = self.progress.step, len(self.local_virtual_ranks)
        self.replica.begin_step()
        losses: list[torch.Tensor] = []
        for virtual_rank in self.local_virtual_ranks:
            self.watchdog.progress(step, "waiting for data")
            with self._data_wait.measure():
                moved = source.take()
            self.watchdog.progress(step, "computing")
            bad += self._report_bad(moved.batch)
            last = virtual_rank == self.local_virtual_ranks[-1]
            losses.append(self._micro_batch(moved, step, virtual_rank, last=last))
            source.prefetch()
            self.replica.statistics.end_micro_batch()
        self.replica.update(step)
        self.exchange.post(
            self.flag.to_vector(),
            RankReport(bad, self._data_wait.take(), self.data.take_bytes_read()),
            sum(losses[1:], losses[0]) / share if share > 1 else losses[0],
        )
        self.replica.average(step)
        self.progress.step += 1
        self.progress.train_s += time.monotonic() - started
        self._log.end_step()

    def _micro_batch(self, moved: OnDevice, step: int, virtual_rank: int, *, last: bool) -> torch.Tensor:
        """Do the forward and backward pass of one micro-batch, and return its loss, on the device."""
        seed_micro_batch(self.spec.seed, step, virtual_rank)
        mixed, shares = self.mix(moved.images, moved.labels)
        if self._samples is not None:
            self._samples.add(step, virtual_rank, self.share, moved.batch, shares)
        mean = self.replica.add_gradients(mixed, shares, last=last, forwarded=self._telemetry.own_time.end)
        self._recent.add(step, virtual_rank, moved.batch.samples, mean)
        return mean

    def _report_bad(self, batch: Batch) -> int:
        for name in batch.bad:
            log.warning("cannot decode %s (in %s)", name, self.data.train_store.url)
        return len(batch.bad)

    def _take_reports(self, *, all_: bool) -> Cause | None:
        """Process the reports of the steps that have been computed, with ``all_`` of all; return why to stop, if so.

        On a GPU this is where the process waits for steps that it has queued, so the wait is part of their time.
        """
        started = time.monotonic()
        reports = self.exchange.take(all_=all_)
        self.progress.train_s += time.monotonic() - started
        return self._process_reports(reports)

    def _process_reports(self, reports: list[StepReport]) -> Cause | None:
        """Add the reports of some steps to the progress; return why to stop, if a rank requests it."""
        cause = None
        for report in reports:
            self.progress.bad_samples += report.bad
            self._log.add(self.progress, report)
            cause = cause or self.flag.agree(report.flags)
            self._reported_step += 1
            if not math.isfinite(report.loss):
                raise DivergedError(self._explain_divergence(report.loss))
        limit = self.recipe.data.max_bad_samples
        if self.progress.bad_samples > limit:
            raise DataError(
                f"{self.progress.bad_samples} images of this epoch cannot be decoded, data.max_bad_samples allows "
                f"{limit}. Their names are in the ranks' logs ('rsb-cluster logs'); fix them, or raise the limit."
            )
        return cause

    def _explain_divergence(self, loss: float) -> str:
        message = explain(
            self.recipe,
            step=self._reported_step,
            loss=loss,
            rate=self.replica.learning_rate.at(self._reported_step - 1),
            scale=self.replica.scaler.get_scale() if self.replica.scaler.is_enabled() else None,
            batches=self._recent,
            folder=self._folder,
        )
        if self.saver is None or self._lease is None:
            return message
        self.saver.flush(within_s=60.0)
        good = last_good_checkpoint(self._folder.child("checkpoints"), self._lease.starts)
        return f"{message} Last good checkpoint: {f'of step {good.step} ({good.folder})' if good else 'none'}."

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
                scores = {"": self._evaluate(self.replica.model)}
                if self.replica.ema is not None:
                    scores["ema_"] = self._evaluate(self.replica.ema.module)
        except EvaluationStopped as stopped:
            return stopped.cause
        self.progress.evaluated_step = step
        self.progress.scores = {prefix: asdict(score) for prefix, score in scores.items()}
        is_best = scores[""].top1 > self.progress.best_top1
        if is_best:
            self.progress.best_top1, self.progress.best_step = scores[""].top1, step
        self._log.evaluated(step, scores)
        if self.saver is not None and is_best and step < self.recipe.total_steps:
            self.saver.save(self.progress, self.replica.state())
        self._log.begin_interval()
        return None

    def _evaluate(self, model: nn.Module) -> Score:
        size = self.batch.images_at_once(self.group.world_size)
        stream = self.data.eval_stream(max(size, 64))
        vote = StopVote(self.group, self.flag, late=self.device.type == "cuda")

        def agree() -> Cause | None:
            self.watchdog.progress(self.progress.step, "evaluating")
            return vote.take()

        outputs = predict_logits(
            model,
            self.data.batches(stream),
            stream,
            device=self.device,
            normalise=self.replica.normalise,
            autocast=self.replica.autocast,
            agree=agree,
        )
        return compute_score(outputs, total=self.data.val_index.num_samples, group=self.group)
