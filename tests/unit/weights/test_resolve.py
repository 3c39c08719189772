"""Every name of weights leads to the same ones; what they start does not change any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import CheckpointError, ConfigError
from rsb_cluster.runs.run import Run
from rsb_cluster.weights.resolve import WeightsFile, find_weights, initial_weights
from tests.unit.new_runs import make_run


def no_hub(name: str) -> WeightsFile:
    raise ConfigError(f"timm does not know {name}.")


def recipe_from(run: Run, source: str, **model: str) -> Recipe:
    recipe = run.recipe()
    changed = {"init": recipe.init.model_copy(update={"weights": source})}
    return recipe.model_copy(update={**changed, "model": recipe.model.model_copy(update=model)})


def test_a_run_its_beginning_its_folder_and_its_checkpoint_are_one_source(trained: Run) -> None:
    names = (trained.run_id, trained.run_id.rpartition("-")[0], trained.url, f"{trained.url}/")
    found = [find_weights(name, trained.runs_url, fetch=no_hub) for name in names]
    found.append(find_weights(found[0].source, "", fetch=no_hub))
    assert len(set(map(str, found))) == 1
    assert (found[0].architecture, found[0].step, found[0].run_url) == ("test_resnet", 18, trained.url)
    assert found[0].source.startswith(f"{trained.url}/checkpoints/step-00000018-a0001")


def test_the_best_checkpoint_and_that_of_a_step(trained: Run) -> None:
    best = json.loads((Path(trained.url) / "result.json").read_text())["best_step"]
    assert find_weights(trained.url, "", which="best").step == best
    assert find_weights(trained.url, "", which="15").step == 15
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4\. It has those of steps .*15"):
        find_weights(trained.url, "", which="4")
    with pytest.raises(ConfigError, match=r"'newest' is not a checkpoint\. Use last, best, or a step"):
        find_weights(trained.url, "", which="newest")


def test_a_name_that_stands_for_nothing_or_for_two_runs(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'digit5' is neither a run in .* As a timm name: timm does not know digit5"):
        find_weights("digit5", trained.runs_url, fetch=no_hub)
    for name in ("one", "other"):
        shutil.copytree(trained.url, tmp_path / f"run-{name}")
    with pytest.raises(ConfigError, match="'run-' is a prefix of 2 runs"):
        find_weights("run-", str(tmp_path), fetch=no_hub)


def test_a_file_that_is_no_weights_and_a_folder_with_the_name_of_a_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").touch()
    Path("sharded.pth").mkdir()
    for name in ("net.onnx", "sharded.pth"):
        with pytest.raises(ConfigError, match=rf"/{name} holds no weights: it is neither a run"):
            find_weights(name, str(tmp_path / "runs"), fetch=no_hub)
    with pytest.raises(ConfigError, match=r"there is nothing at .*/nowhere\. Check the path"):
        find_weights("./nowhere", str(tmp_path / "runs"), fetch=no_hub)


def test_of_a_run_without_checkpoints_it_is_said_whether_there_will_be_any(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find_weights(run.url, "", fetch=no_hub)
    run.store.write_json("result.json", {})
    with pytest.raises(CheckpointError, match="has no checkpoint any more: 'runs delete'"):
        find_weights(run.url, "", fetch=no_hub)


def test_what_is_read_is_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    found = find_weights(str(path), "")
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        found.read()


def test_a_start_is_of_the_recipes_architecture_and_does_not_change_any_more(trained: Run, tmp_path: Path) -> None:
    assert initial_weights(trained.recipe(), "") is None
    found = initial_weights(recipe_from(trained, trained.run_id), trained.runs_url)
    assert found == find_weights(trained.url, "")
    with pytest.raises(ConfigError, match=r"is a test_resnet, model.name is 'resnet18'. Use --model test_resnet"):
        initial_weights(recipe_from(trained, trained.url, name="resnet18"), "")
    shutil.copytree(trained.url, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"has not finished.*name a checkpoint: --init (\S+)") as caught:
        initial_weights(recipe_from(trained, str(tmp_path / "unfinished")), "")
    named = str(caught.value).rpartition(" ")[2]
    assert initial_weights(recipe_from(trained, named), "") == find_weights(named, "")
