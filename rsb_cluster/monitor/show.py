"""Everything about one run, for a page on a terminal or as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import ConfigError
from rsb_cluster.monitor.cleanup import format_bytes
from rsb_cluster.monitor.status import Status, format_duration, read_status
from rsb_cluster.monitor.table import reason, short_hosts, short_job
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.gpu_hours import Span, cost, spans
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run, Spec, Submission


@dataclass(frozen=True)
class Page:
    """A page on a run.

    Attributes:
        facts: What is known, by label; a text may have several lines.
        attempts: A row for each attempt, by column.
        evaluations: A row for each of the last evaluations.
        files: The number of files and their size, by folder.
        values: All of it, and more, as plain values.
    """

    facts: Mapping[str, str]
    attempts: tuple[Mapping[str, str], ...]
    evaluations: tuple[Mapping[str, str], ...]
    files: tuple[Mapping[str, str], ...]
    values: Mapping[str, Any]


# Evaluations shown, the newest last.
MAX_EVALUATIONS = 5


def read_page(run: Run) -> Page:
    """Read everything about a run.

    Raises:
        ConfigError: It is an evaluation and no run.
        RsbError: Its recipe or its spec cannot be read.
    """
    if run.is_evaluation:
        raise ConfigError(f"{run.run_id} is an evaluation: 'status' and 'logs' show its job, 'collect' its result.")
    (status,) = read_status([run])
    recipe, spec, submissions, found = run.recipe(), run.spec(), run.submissions(), spans(run)
    result = run.result()
    starts = {span.attempt.number: span.attempt.start_step for span in found}
    saved = checkpoint.list_checkpoints(run.store.child("checkpoints"), starts)
    rows = [row for row in read_rows(run) if row.get("kind") == "eval"]
    sizes = run.store.sizes()
    facts = {
        "run": run.run_id,
        "folder": run.url,
        "state": _state(status),
        "recipe": f"{recipe.name}{f' (procedure {recipe.paper})' if recipe.paper else ''}, seed {spec.seed}",
        "model": recipe.model.name,
        "modified": "\n".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in sorted(spec.modified.items())),
        "schedule": f"{recipe.schedule.epochs} epochs of {recipe.steps_per_epoch:,} steps, global batch "
        f"{recipe.train.global_batch} = {spec.virtual_ranks} virtual ranks × "
        f"{recipe.train.global_batch // spec.virtual_ranks} images",
        "data": next((s.data for s in reversed(submissions) if s.data), "") or spec.data,
        "initial weights": f"{spec.init.source} (SHA-256 {spec.init.sha256[:12]})" if spec.init else "random",
        "score": _score(result),
        "cost": _cost(found, result),
        "job": "\n".join(map(_job, submissions[-MAX_EVALUATIONS:])),
        "checkpoints": ", ".join(one.folder for one in saved),
        "code": _code(spec),
        "changes": "\n".join(status.changes),
    }
    values = {
        "status": vars(status),
        "recipe": recipe.model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
        "submissions": [submission.model_dump(mode="json") for submission in submissions],
        "attempts": [span.attempt.model_dump(mode="json") for span in found],
        "checkpoints": [one.folder for one in saved],
        "evaluations": rows,
        "result": result and {key: value for key, value in result.items() if key != "science"},
        "files": sizes,
    }
    return Page(
        facts={label: text for label, text in facts.items() if text},
        attempts=tuple(_attempt(span, may_run=span is found[-1] and result is None) for span in found),
        evaluations=tuple(map(_evaluation, rows[-MAX_EVALUATIONS:])),
        files=_files(sizes),
        values=values,
    )


def _state(status: Status) -> str:
    parts = [": ".join(filter(None, (status.state, reason(status))))]
    numbers = [f"step {status.step:,} of {status.total_steps:,}, epoch {status.epoch:.1f}"]
    if status.loss is not None:
        numbers.append(f"loss {status.loss:.4f}")
    if status.images_per_s:
        numbers.append(f"{status.images_per_s:,.0f} images/s")
    if status.eta_s is not None:
        numbers.append(f"ETA {format_duration(status.eta_s)}")
    parts.append(", ".join(numbers))
    if status.engine or status.problem:
        parts.append(": ".join(filter(None, (status.engine, status.problem))))
    return "\n".join(parts)


def _score(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    lines = [f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %" if "top5" in result else ""]
    if ema := result.get("ema"):
        lines.append(f"of the moving average: top-1 {ema['top1']:.2f} %, top-5 {ema['top5']:.2f} %")
    if "best_top1" in result:
        lines.append(f"best top-1 {result['best_top1']:.2f} % after step {result['best_step']:,}")
    return "\n".join(filter(None, lines))


def _cost(found: list[Span], result: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    spent = cost(found)
    hours = f"{spent.gpu_hours:,.1f} GPU-hours" if spent.gpu_hours else f"{spent.rank_hours:,.2f} process-hours"
    parts = [hours, f"{format_duration(spent.wall_s)} h in {spent.attempts} attempt{'s' if spent.attempts > 1 else ''}"]
    parts += [f"{spent.preemptions} preempted"] * bool(spent.preemptions)
    parts += [f"{spent.steps_repeated:,} steps repeated"] * bool(spent.steps_repeated)
    if result and "goodput" in result:
        parts.append(f"goodput {100 * result['goodput']:.1f} %")
    return ", ".join(parts)


def _job(submission: Submission) -> str:
    job = submission.job
    where = f"job {submission.job_id} on {submission.backend}"
    where += f" ({job['name']})" if job.get("name") else ""
    limit = f", time limit {format_duration(60 * job['time_min'])}" if job.get("time_min") else ""
    by = f" by {submission.user}" if submission.user else ""
    shape = f": {submission.shape}" if submission.shape else ""
    return f"{where}{shape}{limit}, submitted {_time(submission.time)}{by}\n  scripts and logs: {submission.folder}"


def _code(spec: Spec) -> str:
    code = spec.brief().code
    parts = [
        code.get("version", ""),
        code.get("commit", "")[:12],
        "with uncommitted changes" * bool(code.get("uncommitted")),
    ]
    packages = [f"{name} {spec.packages[name]}" for name in ("torch", "timm") if name in spec.packages]
    return ", ".join([" ".join(filter(None, parts)), *packages]).strip(", ")


def _attempt(span: Span, *, may_run: bool) -> dict[str, str]:
    attempt = span.attempt
    steps = f"{attempt.start_step:,}-{span.end_step:,}"
    end = attempt.cause or ("no end recorded: it runs, or was killed" if may_run else "killed")
    return {
        "#": str(attempt.number),
        "job": short_job(attempt.job_id),
        "hosts": short_hosts(attempt.hosts),
        "ranks": str(attempt.world_size),
        "started (UTC)": _time(attempt.started)[5:-3],
        "duration": format_duration(span.seconds),
        "steps": steps,
        "end": f"{end}: {attempt.message}" if attempt.message else end,
    }


def _evaluation(row: Mapping[str, Any]) -> dict[str, str]:
    def number(name: str, digits: int) -> str:
        value = row.get(name)
        return "–" if value is None else f"{value:.{digits}f}"

    shown = {"step": f"{row['step']:,}", "epoch": number("epoch", 1)}
    return shown | {"top-1": number("top1", 2), "top-5": number("top5", 2), "loss": number("loss", 4)}


def _files(sizes: Mapping[str, int]) -> tuple[dict[str, str], ...]:
    folders: dict[str, list[int]] = {}
    for name, size in sizes.items():
        folders.setdefault(f"{name.split('/')[0]}/" if "/" in name else name, []).append(size)
    rows = [
        {"files": name, "number": f"{len(found):,}", "size": format_bytes(sum(found))}
        for name, found in sorted(folders.items())
    ]
    total = {"files": "total", "number": f"{len(sizes):,}", "size": format_bytes(sum(sizes.values()))}
    return (*rows, total)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
