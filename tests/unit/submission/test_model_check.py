"""A model is checked once, and again when the code or a library has changed."""

import json
import os
import re
from pathlib import Path

import pytest

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.errors import ConfigError
from rsb_cluster.submission import model_check
from rsb_cluster.submission.model_check import check_models


def test_a_model_that_timm_does_not_know_is_refused_with_the_nearest(rsb):
    said = rsb.error("submit", "--recipe", "a1", "--job", "slurm", "--model", "resnet5", "--dry-run")
    assert re.search(r"model.name = 'resnet5': timm has no such model. Did you mean 'resnet\w*'\?\n", said)


def test_a_model_that_takes_one_size_only_is_refused_with_what_to_do(rsb):
    said = rsb.error("submit", "--recipe", "a3", "--job", "slurm", "--model", "deit_small_patch16_224", "--dry-run")
    assert "model.name = 'deit_small_patch16_224' does not accept images of 160 px" in said
    assert "add --set model.kwargs.dynamic_img_size=true" in said


def recipe_of(*assignments: str) -> Recipe:
    return load_recipe("digits", overrides=parse_overrides(assignments)).recipe


SMALL, OTHER, UNKNOWN = recipe_of(), recipe_of("model.name=test_resnet"), recipe_of("model.name=resnet51")


@pytest.fixture(scope="module")
def answers() -> dict[str, int]:
    """The answers of the real check, run once for this module."""
    return dict(zip(("small", "other"), model_check._build([(SMALL, None, False), (OTHER, None, True)]), strict=True))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, int]) -> list[list[str]]:
    """The models that were checked, a list for each process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: list[list[str]] = []

    def build(asked: list[tuple[Recipe, None, bool]]) -> list[int]:
        found.append([recipe.model.name for recipe, _, _ in asked])
        if any(recipe == UNKNOWN for recipe, _, _ in asked):
            raise ConfigError("no such model")
        return [answers["small" if recipe == SMALL else "other"] for recipe, _, _ in asked]

    monkeypatch.setattr(model_check, "_build", build)
    return found


def test_a_model_is_built_once(asked: list[list[str]], answers: dict[str, int]) -> None:
    small, other = answers["small"], answers["other"]
    assert small != other and min(small, other) > 1000
    assert check_models([(SMALL, None), (SMALL, None)]) == [small, small]
    rate = recipe_of("optimizer.lr=0.1")  # a number that the recipe checks itself
    assert check_models([(OTHER, None), (SMALL, None), (rate, None)]) == [other, small, small]
    assert check_models([]) == []
    assert asked == [["resnet10t"], ["test_resnet"]]


def test_a_model_that_passed_is_checked_again_for_a_job_with_gradient_checkpointing(asked: list[list[str]]) -> None:
    for recompute in (False, True, True):
        check_models([(SMALL, None)], [recompute])
    assert len(asked) == 2


def test_a_model_that_cannot_compute_activations_again_is_refused(rsb):
    said = rsb.error(
        "submit", "--recipe", "a3", "--job", "slurm", "--model", "vgg11_bn", "--dry-run",
        "--set", "job.gradient_checkpointing=true",
    )  # fmt: skip
    assert "job.gradient_checkpointing: timm cannot do it for VGG." in said


def test_an_error_is_reported_each_time(asked: list[list[str]]) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="no such model"):
            check_models([(SMALL, None), (UNKNOWN, None)])
    assert len(asked) == 2


@pytest.mark.parametrize("change", ["code", "library", "damage"])
def test_a_model_is_checked_again_after(change: str, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    check_models([(SMALL, None)])
    if change == "library":
        monkeypatch.setattr(model_check, "version", lambda name: "99")
    elif change == "code":
        path, rglob = Path(model_check.__file__).parents[1], Path.rglob
        monkeypatch.setattr(Path, "rglob", lambda self, what: list(rglob(self, what))[1:] if self == path else [])
    else:
        (Path(os.environ["XDG_CACHE_HOME"]) / "rsb-cluster" / "models.json").write_text(json.dumps({"good": [1]}))
    check_models([(SMALL, None)])
    assert len(asked) == 2


def test_the_check_works_without_a_writable_cache(asked: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert check_models([(SMALL, None)]) == check_models([(SMALL, None)])
    assert len(asked) == 2
