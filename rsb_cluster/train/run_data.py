"""The data of a run, as one rank reads them: both sets, and the way from their shards to batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.global_batch import Share
from rsb_cluster.data.index import load_index
from rsb_cluster.data.order import groups_of
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.errors import DataError
from rsb_cluster.runs.run import Spec
from rsb_cluster.storage.store import Store
from rsb_cluster.train.augment import EvalTransform, TrainTransform
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches, Split
from rsb_cluster.train.input.loader import Batch, ThreadedBatches, process_batches
from rsb_cluster.train.input.neighbours import Neighbours, find_neighbours
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain
from rsb_cluster.train.input.sharing import Sharing
from rsb_cluster.train.input.streams import EvalStream, TrainStream


class RunData:
    """The training set and the evaluation set of a run.

    Args:
        spec: The run's spec.
        recipe: Its recipe.
        job: The job.
        group: The processes; each calls this.
        shares: What each process has of a global batch.
        decoders: Forks the processes that decode; None: images are decoded in this process.

    Attributes:
        train_store: The shards of the training set.
        train_index: The index of the training set.
        val_index: The index of the evaluation set.
        neighbours: The ranks of this node with which this one shares the decoding; None if each decodes for itself.

    Raises:
        DataError: The shards are not there, or were indexed again since the run was submitted.
    """

    def __init__(
        self,
        spec: Spec,
        recipe: Recipe,
        job: Job,
        group: ProcessGroup,
        shares: Sequence[Share],
        decoders: DecoderServer | None,
    ) -> None:
        self._spec, self._recipe, self._job, self._group = spec, recipe, job, group
        self._shares, self._share, self._decoders = shares, shares[group.rank], decoders
        root = Store(spec.data)
        self.train_store, self._val_store = root.child("train"), root.child("val")
        try:
            self.train_index, self.val_index = (
                choose_classes(load_index(store), recipe.data.classes, store.url)
                for store in (self.train_store, self._val_store)
            )
        except DataError as error:
            raise DataError(f"{error}\nIf the shards were moved, submit the run again with --data.") from error
        self._shared: dict[str, SharedIndex] = {}
        if decoders is not None:
            for store, index in ((self.train_store, self.train_index), (self._val_store, self.val_index)):
                self._shared[store.url] = SharedIndex(index)
            self.train_index, self.val_index = (shared.index for shared in self._shared.values())
        limit = int(job.cache_gb * 1e9)
        self._cache = ShardCache(Path(job.cache_dir), limit) if job.cache_dir else None
        self._reader = ShardReader(self.train_store, self.train_index, cache=self._cache)
        self._elsewhere: ProcessBatches | None = None
        self._bytes_seen = 0
        for name, index, digest in (
            ("train", self.train_index, spec.train_digest),
            ("val", self.val_index, spec.val_digest),
        ):
            if not index.has_digest(digest):
                raise DataError(
                    f"{spec.data}/{name} was indexed again since this run was submitted: its samples may have changed. "
                    "Restore the old shards, or submit again to start a new run."
                )
        self.neighbours = self._find_neighbours()

    def _find_neighbours(self) -> Neighbours | None:
        repeats, alone = self._recipe.augment.repeats, self._group.world_size == 1
        shares_nothing = alone or (repeats == 1 and self._share.is_whole)
        if self._decoders is None or self._recipe.data.pipeline == "timm" or shares_nothing:
            return None
        groups = groups_of(self._spec.virtual_ranks, repeats, self._spec.draws)
        return find_neighbours(self._group.gather, self._group.rank, self._shares, groups)

    def train_stream(self, start_step: int) -> TrainStream:
        """Return this rank's samples of the steps from one on."""
        return TrainStream(
            self._reader,
            self._recipe,
            self.train_index,
            seed=self._spec.seed,
            virtual_ranks=self._spec.virtual_ranks,
            local_virtual_ranks=self._share.virtual_ranks,
            start_step=start_step,
            stop_step=self._recipe.total_steps,
            sharing=self.neighbours.sharing if self.neighbours is not None else Sharing.among([self._share], 0),
            draws=self._spec.draws,
        )

    def eval_stream(self, batch: int) -> EvalStream:
        """Return this rank's part of the evaluation set, in batches of so many images."""
        reader = ShardReader(self._val_store, self.val_index, cache=self._cache)
        group = self._group
        return EvalStream(reader, self.val_index, rank=group.rank, world_size=group.world_size, batch=batch)

    def batches(self, stream: TrainStream | EvalStream) -> Iterable[Batch]:
        """Return the batches of one of this rank's streams, by the recipe's pipeline."""
        recipe, workers, pin = self._recipe, self._job.loader_workers, self._group.device.type == "cuda"
        training = isinstance(stream, TrainStream)
        if recipe.data.pipeline == "timm":
            stock = TrainTransform(recipe) if training else EvalTransform(recipe.eval)
            return process_batches(stream, stock, workers=workers, pin=pin)
        fast = FastTrain(recipe) if training else FastEval(recipe.eval)
        side = recipe.augment.resolution if training else recipe.eval.resolution
        if self._decoders is None or not workers:
            return ThreadedBatches(stream, fast, side=side, threads=workers, pin=pin)
        store = self.train_store if training else self._val_store
        cache_bytes = int(self._job.cache_gb * 1e9)
        split = Split(store.url, self._shared[store.url], self._job.cache_dir, cache_bytes)
        neighbours = self.neighbours if training else None
        batches = ProcessBatches(
            self._decoders, split, stream, fast, side=side, threads=workers, pin=pin, neighbours=neighbours
        )
        if training:
            self._elsewhere = batches
        return batches

    def take_bytes_read(self) -> int:
        """Return the bytes of training shards read for this rank since the last call, by whichever process."""
        elsewhere = self._elsewhere.bytes_read if self._elsewhere is not None else 0
        seen, self._bytes_seen = self._bytes_seen, self._reader.bytes_read + elsewhere
        return self._bytes_seen - seen

    def needed_bytes(self, steps: int) -> float:
        """Return the bytes of the distinct images of so many steps."""
        images = steps * self._recipe.train.global_batch / self._recipe.augment.repeats
        return images * float(self.train_index.image_sizes.mean())
