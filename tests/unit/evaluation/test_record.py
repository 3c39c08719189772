"""An evaluation is kept, and a different one of the same name beside it."""

from __future__ import annotations

from pathlib import Path

from rsb_cluster.results.collect import collect
from tests.unit.results.collect.made import an_evaluation


def test_a_different_result_of_the_same_evaluation_is_kept_beside(tmp_path: Path) -> None:
    before, now = an_evaluation(80.1, finished=5.0), an_evaluation(80.2, finished=9.0)
    assert before.save(str(tmp_path)) == ""
    assert before.model_copy(update={"finished": 6.0}).save(str(tmp_path)) == ""
    assert "was 80.1, is 80.2 now" in now.save(str(tmp_path))
    assert [line.mean for line in collect((), weights_in=str(tmp_path)).evaluations] == [80.2]
    assert len(list((tmp_path / "evaluations" / before.owner).iterdir())) == 2
    others = [
        an_evaluation(1.0, **change) for change in ({"crop": 0.9}, {"exact": True}, {"labels": "real"}, {"amp": "bf16"})
    ]
    assert len({one.name for one in (now, *others)}) == 5
