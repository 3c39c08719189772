"""A run that has exceeded its GPU-hour budget."""

import json
from pathlib import Path

from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.run import Run
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import Lab


def test_it_saves_and_stops_is_not_restarted_and_resumes_with_more(
    tmp_path: Path, tiny_digits: Path, tiny_unbroken: Run
) -> None:
    """The budget is so small that it is exceeded before the first step."""
    lab = Lab(tmp_path / "run", tiny_digits)
    ample = lab.job
    told = tmp_path / "told"
    tell = {"notify_command": f"cat >>'{told}'; echo >>'{told}'"}
    ample = ample.model_copy(update=tell)
    lab.job = ample.model_copy(update={"max_gpu_hours": 1e-7})
    stopped = lab.attempt()
    assert (stopped.cause, stopped.start_step, stopped.end_step) == ("stopped", 0, 1)
    assert "of 1e-07). Its state is saved; submit it again with a larger" in stopped.message
    assert [saved.step for saved in checkpoint.list_checkpoints(lab.checkpoints, {1: 0})] == [1]
    assert lab.start() == "stopped" and len(lab.run.attempts()) == 1, "its job has stopped it permanently"
    lab.resubmit()
    refused = lab.attempt()
    assert (refused.cause, refused.start_step, refused.end_step) == ("stopped", 1, 1)
    assert refused.message.startswith(f"{lab.run.run_id} exceeded its GPU-hour budget (used 0.00 of 1e-07)")
    lab.job = ample
    lab.resubmit()
    finished = lab.attempt()
    assert (finished.cause, finished.start_step) == ("finished", 1)
    first, second, last = map(json.loads, told.read_text().splitlines())
    assert [m["state"] for m in (first, second, last)] == ["budget exceeded", "budget exceeded", "finished"]
    assert first["reason"] == stopped.message and first["row"]["state"] == "stopped"
    assert last["row"]["top1"] == lab.run.result()["top1"]  # type: ignore[index]
    assert_bit_equal(final_state(lab.run), final_state(tiny_unbroken))
    assert rows_of(lab.run) == rows_of(tiny_unbroken)
