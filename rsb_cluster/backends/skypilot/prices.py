"""Prices of nodes, from the catalogs that SkyPilot keeps in the home folder: CSV files, one per cloud.

The files are read directly, which needs no network and no import of SkyPilot. SkyPilot downloads them when it is used.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path

from rsb_cluster.backends.base import Price
from rsb_cluster.config.job import Job

# Names of clouds in ``infra`` that differ from those of the catalogs.
_NAMES = {"kubernetes": "k8s"}


def price(job: Job, *, spot: bool) -> Price | None:
    """Return the lowest price of a node; None if no catalog has a node that fits the job."""
    if job.cloud.price:
        return Price(job.cloud.price, "job.cloud.price") if spot == job.cloud.spot else None
    column = "SpotPrice" if spot else "Price"
    prices = []
    for path in _catalogs(job):
        date = time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))
        for row in _fitting(path, job):
            try:
                source = f"{row['InstanceType']}, {path.parent.name}/{row['Region']}, catalog of {date}"
                prices.append(Price(float(row[column]), source))
            except (KeyError, ValueError):
                continue  # not offered as spot, or not on demand
    return min(prices, key=lambda p: p.usd_per_h, default=None)


def _catalogs(job: Job) -> list[Path]:
    """Return the newest catalog of each cloud in the job's ``infra``, or of all clouds."""
    named = {where.split("/")[0] for where in job.cloud.infra}
    newest = {path.parent.name: path for path in sorted(Path.home().glob(".sky/catalogs/v*/*/vms.csv"), key=_version)}
    return [path for cloud, path in newest.items() if not named or _NAMES.get(cloud, cloud) in named]


def _version(path: Path) -> int:
    digits = path.parent.parent.name.removeprefix("v")
    return int(digits) if digits.isdigit() else 0


def _fitting(path: Path, job: Job) -> Iterator[dict[str, str]]:
    name, _, _ = job.cloud.accelerators.partition(":")
    regions = {where.split("/")[1] for where in job.cloud.infra if where.startswith(f"{path.parent.name}/")}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if regions and row.get("Region") not in regions:
                continue
            if job.cloud.instance_type:
                fits = row.get("InstanceType") == job.cloud.instance_type
            else:
                fits = (
                    (row.get("AcceleratorName") or "").lower() == name.lower()
                    and _number(row, "AcceleratorCount") == job.cloud.gpus
                    and _number(row, "vCPUs") >= job.ranks_per_node * job.cpus_per_task
                    and _number(row, "MemoryGiB") >= job.mem_gb
                )
            if fits:
                yield row


def _number(row: dict[str, str], column: str) -> float:
    try:
        return float(row.get(column) or 0)
    except ValueError:
        return 0.0
