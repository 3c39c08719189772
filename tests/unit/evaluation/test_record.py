"""An evaluation is kept, and a different one of the same name beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.config.schema import validate
from rsb_cluster.errors import ConfigError
from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
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


def test_mean_and_std_are_part_of_the_name_where_they_are_not_the_weights_own() -> None:
    plain = an_evaluation(80.1)
    assert plain.name == "imagenet-1k-val-224px-8f446c21"
    own = an_evaluation(80.1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    others = [an_evaluation(80.1, overrides={"mean": (mean, 0.5, 0.5)}) for mean in (0.5, 0.4)]
    assert own.name == plain.name and len({one.name for one in (plain, *others)}) == 3
    assert Evaluation.model_validate_json(others[0].model_dump_json()).name == others[0].name


def test_a_mean_on_another_scale_is_refused() -> None:
    asked = {"sources": ("w.pth",), "runs": "", "data": "x"}
    for wrong in ({"mean": (123.7, 116.3, 103.5)}, {"std": (0.5, 0.5, 0.0)}):
        with pytest.raises(ConfigError, match=r"evaluate: (mean|std)"):
            validate(EvaluationRequest, asked | wrong, "evaluate")
