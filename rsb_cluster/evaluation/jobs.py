"""Evaluations as jobs: what a job is to evaluate, how far it is, and its result.

The folder ``<runs>/evaluation-jobs/eval-<weights>-<data set>-<digest>/`` is laid out as that of a run, as far as it
concerns the job: ``submissions/``, ``attempts/``, ``logs/``, ``cancelled.json``. Besides, it has

- ``spec.json``: what is to be evaluated; written once
- ``evaluated/0000.json``: a copy of the record of each request that is done, so another attempt starts after it
- ``result.json``: written last; it makes the evaluation finished

The records themselves are where other evaluations are (`rsb_cluster.evaluation.record`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

from pydantic import ConfigDict, Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import MissingError
from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest, safe_name
from rsb_cluster.runs.run import EVALUATION_JOBS, EVALUATION_PREFIX, Run
from rsb_cluster.storage.store import Store

_DONE = "evaluated"


class EvaluationJob(Section):
    """What a job evaluates: the same weights on one data set or more.

    Attributes:
        weights: Name of the weights.
        requests: One source each, always the same one.
        data: Names of the data sets, one for each request.
        images: Number of images of all requests.
        created: Unix time.
    """

    weights: str
    requests: tuple[EvaluationRequest, ...] = Field(min_length=1)
    data: tuple[str, ...]
    images: int
    created: float


class EvaluationResult(Section):
    """The result of an evaluation job.

    Attributes:
        evaluations: Copies of the records, in the order of the requests.
        attempts: Number of attempts.
        finished: Unix time.
    """

    # A later version may add fields; the result must still be readable.
    model_config = ConfigDict(frozen=True, extra="ignore")

    evaluations: tuple[Evaluation, ...] = Field(min_length=1)
    attempts: int
    finished: float


def job_run(runs_url: str, job: EvaluationJob, digests: Sequence[str]) -> Run:
    """Return the folder of an evaluation job, whether it exists or not.

    Args:
        runs_url: The folder of runs.
        job: The job.
        digests: The digests of the weights, the data and the labels, which the requests only name.
    """
    requests = [request.model_dump(mode="json", exclude={"workers", "batch_size"}) for request in job.requests]
    digest = hashlib.sha256(json.dumps([requests, *digests], sort_keys=True).encode()).hexdigest()[:8]
    what = job.data[0] if len(job.data) == 1 else f"{len(job.data)}-sets"
    name = f"{EVALUATION_PREFIX}{safe_name(job.weights)}-{what}-{digest}"
    return Run.at(Store(runs_url).child(EVALUATION_JOBS).url, name)


def read_job(run: Run) -> EvaluationJob:
    """Read what a job evaluates."""
    return read_record(EvaluationJob, run.store.read_json("spec.json"), run.store.locate("spec.json"))


def read_result(run: Run) -> EvaluationResult | None:
    """Read the result of a job; None if it has not finished."""
    try:
        return read_record(EvaluationResult, run.store.read_json("result.json"), run.store.locate("result.json"))
    except MissingError:
        return None


def write_done(run: Run, number: int, evaluation: Evaluation) -> None:
    """Record that a request, counted from 0, is done."""
    run.store.write_json(f"{_DONE}/{number:04d}.json", evaluation.model_dump(mode="json"))


def count_done(run: Run) -> int:
    """Return how many requests are done."""
    return len([name for name in run.store.names(_DONE) if name.endswith(".json")])


def write_result(run: Run, requests: int) -> None:
    """Write the result of a job whose requests are all done."""
    names = [f"{_DONE}/{number:04d}.json" for number in range(requests)]
    found = tuple(read_record(Evaluation, run.store.read_json(name), run.store.locate(name)) for name in names)
    result = EvaluationResult(evaluations=found, attempts=len(run.attempt_numbers()), finished=time.time())
    run.store.write_json("result.json", result.model_dump(mode="json"))
