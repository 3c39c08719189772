"""GPU-hours from images a second."""

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.errors import ConfigError
from rsb_cluster.submission.estimate import gpu_hours, parse_rates

pytestmark = pytest.mark.usefixtures("here")


def test_rates_are_for_models():
    rates = parse_rates(["resnet18=3000", "resnet*=1000", "50"])
    recipe = catalog.load_recipe("a3").recipe
    images = recipe.total_steps * 2048
    for model, rate in (("resnet18", 3000), ("resnet50", 1000), ("vit", 50)):
        named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": model})})
        assert gpu_hours(named, rates) == pytest.approx(images / rate / 3600)
    assert gpu_hours(recipe, parse_rates(["resnet18=3000"])) is None
    for wrong in ("x", "resnet18=", "resnet18=-1", "0", "nan"):
        with pytest.raises(ConfigError, match="is neither images/s, such as 1200, nor MODEL=images/s"):
            parse_rates([wrong])
