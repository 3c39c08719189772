"""What does not fit is refused before anything is queued."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsb_cluster.errors import ConfigError
from rsb_cluster.train import preflight
from tests.unit.fine_tuning import SHORT, from_, plan_short, write_weights


def test_weights_that_do_not_fit_are_refused_before_anything_is_queued(tmp_path: Path, digits: Path) -> None:
    write_weights(tmp_path / "w.safetensors", **{"fc.weight": torch.zeros(7, 96), "stranger": torch.zeros(1)})
    [one] = plan_short("digits", digits, tmp_path / "runs", *SHORT, from_(tmp_path / "w.safetensors"))
    with pytest.raises(ConfigError, match="does not fit test_resnet: stranger is not in the model"):
        preflight.check(one.recipe, one.init)
