"""Machines that a cloud reclaimed after a notice, before the run had saved."""

from pathlib import Path

import pytest

from rsb_cluster.train.lost_peer import LostPeerError
from tests.faults.lab import AtStep, Lab


@pytest.mark.parametrize(("announced", "cause"), [(True, "preempted"), (False, "lost peer")])
def test_a_peer_that_is_lost_after_a_notice_was_preempted_and_is_no_crash(
    tmp_path: Path, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch, announced: bool, cause: str
) -> None:
    """Two crashes in a row without a new step would end the run."""
    monkeypatch.setenv("RSB_METADATA_URL", "http://127.0.0.1:1")  # nobody there
    lab = Lab(tmp_path / "run", tiny_digits)
    lab.job = lab.job.model_copy(update={"notice": "aws"})

    def lose_the_peer() -> None:
        if announced:
            lab.run.write_notice(1, "h9", {"source": "aws", "deadline": 1795457377.0, "text": "{}"})
        raise LostPeerError("lost a peer rank")

    attempt = lab.attempt(AtStep({5: lose_the_peer}))
    assert (attempt.cause, attempt.end_step) == (cause, 4)
    notice = "aws reclaims h9 at 18:09:37 UTC; " if announced else ""
    assert attempt.message == f"{notice}lost a peer rank"
