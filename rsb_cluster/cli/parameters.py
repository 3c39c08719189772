"""Values of options, as users type them: numbers of nodes, seeds, time limits."""

from __future__ import annotations

from typing import Any

import click

MAX_SEEDS = 10_000


class Nodes(click.ParamType):  # type: ignore[type-arg]  # generic in stubs only
    """A number of nodes: ``4``, or ``2-4``."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the minimum and the maximum."""
        low, _, high = str(value or "0").partition("-")
        is_range = low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)
        if not is_range or (value and not int(high or low)):
            self.fail(f"{value!r} is neither a number of nodes nor a range such as 2-4", param, ctx)
        return int(low), int(high or low)


class Seeds(click.ParamType):  # type: ignore[type-arg]  # generic in stubs only
    """Seeds: how many from 0 (``3``), a list (``1,5,7``) or a range (``0-4``)."""

    name = "N|LIST|A-B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the seeds, each once."""
        if isinstance(value, tuple):
            return value
        if value.isdecimal():
            count = int(value)
            if not 0 < count <= MAX_SEEDS:
                self.fail(
                    f"{value} is no number of seeds between 1 and {MAX_SEEDS:,}; one seed is --seed N", param, ctx
                )
            return tuple(range(count))
        seeds: list[int] = []
        for part in value.split(","):
            low, dash, high = part.strip().partition("-")
            if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) < int(low):
                self.fail(f"{value!r} is neither a number of seeds, nor a list such as 1,5,7 or 0-4", param, ctx)
            if int(high or low) - int(low) >= MAX_SEEDS:
                self.fail(f"{part} is more than {MAX_SEEDS:,} seeds", param, ctx)
            seeds += range(int(low), int(high or low) + 1)
        return tuple(dict.fromkeys(seeds))


class TimeLimit(click.ParamType):  # type: ignore[type-arg]  # generic in stubs only
    """A time limit as sbatch takes it: minutes, ``H:MM:SS`` or ``D-H``, ``D-H:MM``, ``D-H:MM:SS``."""

    name = "MIN|H:MM:SS|D-H"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return whole minutes, at least one."""
        if isinstance(value, int):
            return value
        days, dash, clock = value.rpartition("-")
        parts = clock.split(":")
        if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
            self.fail(f"{value!r} is no time limit such as 90 (minutes), 12:00:00 or 2-0 (days-hours)", param, ctx)
        numbers = [int(part) for part in parts]
        # With days the first number is hours; without, one or two numbers are minutes and seconds, as for sbatch.
        if not dash and len(numbers) < 3:
            numbers.insert(0, 0)
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        seconds += (((int(days or 0) * 24 + hours) * 60) + minutes) * 60
        if not seconds:
            self.fail(f"{value!r} is no time at all", param, ctx)
        return -(-seconds // 60)
