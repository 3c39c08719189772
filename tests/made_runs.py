"""Folders of runs that look like trained ones, made in no time: for the report, and for benchmarks of many runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from rsb_cluster.config import catalog
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.results.references import lookup
from rsb_cluster.runs.gpu_hours import cost, spans
from rsb_cluster.runs.run import Attempt, Run, Spec, Submission

START = 1_790_000_000.0
MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ENDINGS = ("finished",) * 8 + ("running", "failed")


def make_runs(folder: str | Path, number: int, *, rows: int = 120, endings: tuple[str, ...] = ENDINGS) -> list[Run]:
    """Make runs of A1, A2 and A3 on five models, as many seeds as it takes, some of them not finished.

    Args:
        folder: Where.
        number: How many.
        rows: Metrics rows of each; 0 for no metrics.
        endings: States that the runs take in turn.
    """
    recipes = [catalog.load_recipe(name, model=model).recipe for name in ("a1", "a2", "a3") for model in MODELS]
    made = []
    for i in range(number):
        draw = random.Random(i)
        recipe, seed = recipes[i % len(recipes)], i // len(recipes)
        made.append(_make(folder, recipe, seed, draw, rows, endings[draw.randrange(len(endings))]))
    return made


def _make(folder: str | Path, recipe: Recipe, seed: int, draw: random.Random, rows: int, ending: str) -> Run:
    run_id = f"{recipe.name}-{recipe.model.name}-s{seed}-{recipe.digest(seed, 'made')}"
    run = Run.at(folder, run_id)
    packages = {"torch": "2.8.0", "timm": "1.0.20", "numpy": "2.3.0"}
    spec = Spec(
        run_id=run_id, seed=seed, virtual_ranks=4, data="s3://data/imagenet-1k", train_digest="t", val_digest="v",
        code={"version": "0.1.0", "python": "3.11.2", "platform": "Linux"}, packages=packages, created=START,
    )  # fmt: skip
    run.create(recipe, spec)
    total, known = recipe.total_steps, lookup(recipe.paper, recipe.model.name)
    assert known is not None
    top1 = known.references[0].top1 + draw.gauss(-0.02, 0.12)
    speed = draw.gauss(4800, 250)
    waiting = min(0.6, abs(draw.gauss(0.02, 0.03)))
    reach = total if ending == "finished" else int(total * draw.uniform(0.2, 0.9))
    _attempts(run, recipe, draw, reach, speed, ending)
    if rows:
        _metrics(run, recipe, draw, reach, speed, waiting, top1, rows)
    if ending == "finished":
        _result(run, recipe, spec, top1, speed)
    return run


def _attempts(run: Run, recipe: Recipe, draw: random.Random, reach: int, speed: float, ending: str) -> None:
    cuts = sorted(draw.uniform(0.1, 0.95) for _ in range(draw.choice((0, 0, 0, 1, 1, 2, 4))))
    stops = [int(cut * reach) for cut in cuts] + [reach]
    now, step = START + draw.uniform(0, 40) * 3600, 0
    job = str(4000 + draw.randrange(900))
    run.add_submission(Submission(backend="slurm", job_id=job, folder="f", shape="1x4", time=now))
    for number, stop in enumerate(stops, 1):
        now += draw.expovariate(1 / 5000)
        ended = now + (stop - step) * recipe.train.global_batch / speed
        last = number == len(stops)
        cause = (
            ("" if ending == "running" else ending)
            if last
            else draw.choice(("preempted", "preempted", "timed out", ""))
        )
        message = "CUDA error: an illegal memory access was encountered" if cause == "failed" else ""
        dead: dict[str, Any] = {"ended": ended, "end_step": stop, "cause": cause, "message": message}
        run.write_attempt(
            Attempt(
                number=number, job_id=job, restart=number - 1, world_size=4, gpus=4, started=now, start_step=step,
                hosts=(f"node-{draw.randrange(40)}",), **(dead if cause else {}),
            )
        )  # fmt: skip
        if not cause:
            run.store.write_json(f"attempts/{number:04d}-alive.json", {"step": stop, "time": ended, "beats": 9})
        run.store.write_bytes(f"logs/{number:04d}-rank00000.log", b"step 1\n")
        now, step = ended, max(0, stop - draw.randrange(800)) if not cause else stop


def _metrics(
    run: Run, recipe: Recipe, draw: random.Random, reach: int, speed: float, waiting: float, top1: float, rows: int
) -> None:
    lines: dict[int, list[str]] = {}
    attempts = run.attempts()
    for i in range(1, rows + 1):
        step = i * reach // rows
        done = step / recipe.total_steps
        attempt = max((a for a in attempts if a.start_step < max(step, 1)), key=lambda a: a.number, default=attempts[0])
        epoch = step / recipe.steps_per_epoch
        row = {
            "kind": "train", "step": step, "epoch": epoch, "time": START + step,
            "loss": 0.0018 + 0.0055 * math.exp(-5 * done) + draw.gauss(0, 2e-5),
            "images_per_s": speed * draw.gauss(1, 0.02), "data_wait_s": waiting * recipe.train.global_batch / speed,
            "step_s_p50": recipe.train.global_batch / speed, "step_s_p99": 1.25 * recipe.train.global_batch / speed,
            "slowest_rank": 3, "slowest_host": "node-07", "slowest_by": 0.12, "gpu_energy_j": 3.6e6,
        }  # fmt: skip
        score = {"kind": "eval", "step": step, "epoch": epoch, "time": START + step}
        score["top1"] = top1 * (1 - 0.75 * math.exp(-4 * done) - 0.12 * (1 - done)) + draw.gauss(0, 1.2 * (1 - done))
        lines.setdefault(attempt.number, []).extend((json.dumps(row), json.dumps(score)))
    for number, texts in lines.items():
        run.store.write_bytes(f"metrics/{number:04d}-000000.jsonl", ("\n".join(texts) + "\n").encode())


def _result(run: Run, recipe: Recipe, spec: Spec, top1: float, speed: float) -> None:
    spent = cost(spans(run))
    images = recipe.total_steps * recipe.train.global_batch
    train_s = images / speed * 0.985
    result = {
        "run_id": spec.run_id, "recipe": recipe.name, "model": recipe.model.name, "seed": spec.seed,
        "steps": recipe.total_steps, "epochs": recipe.schedule.epochs, "loss": 0.0021,
        "top1": top1, "top5": 93.0 + top1 / 100,
        "samples": recipe.data.val_samples, "modified": {}, **vars(spent), "train_s": train_s, "images_per_s": speed,
        "goodput": min(1.0, train_s / spent.wall_s), "finished": START + 1e6,
        "science": {"recipe": recipe.model_dump(mode="json"), "spec": spec.brief().model_dump(mode="json")},
    }  # fmt: skip
    run.store.write_json("result.json", result)
