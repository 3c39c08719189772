"""What a task says before it trains."""

import pytest

from rsb_cluster import __version__
from rsb_cluster.node import task as module
from rsb_cluster.node.task import Task


@pytest.mark.parametrize(("version", "says"), [("", False), (__version__, False), ("0.0.9", True)])
def test_another_version_than_the_one_that_submitted_is_named_before_training(monkeypatch, capsys, version, says):
    """Its Python may be a container's."""

    class Worker:
        @staticmethod
        def work(*_: object) -> None:
            said = capsys.readouterr().err
            assert (f"has rsb-cluster {__version__}, and 0.0.9 submitted the job" in said) == says

    monkeypatch.setattr(module.importlib, "import_module", lambda name: Worker)
    Task("/runs/a", "a", {"time_min": 60, "signal_delay_s": 60}, version=version)()


@pytest.mark.parametrize(
    ("folder", "worker"),
    [
        ("/runs/a1-resnet50-s0", "rsb_cluster.train.worker"),
        ("/runs/evaluation-jobs/eval-a1", "rsb_cluster.train.validation.job"),
        ("/runs/evaluation-jobs/a1", "rsb_cluster.train.worker"),  # a folder of runs that somebody called so
        ("/runs/eval-a1-resnet50-s0", "rsb_cluster.train.worker"),  # a recipe
    ],
)
def test_the_folder_says_whether_to_train_or_to_evaluate(monkeypatch, folder, worker):
    asked = []

    class Worker:
        @staticmethod
        def work(*_: object) -> None:
            pass

    monkeypatch.setattr(module.importlib, "import_module", lambda name: asked.append(name) or Worker)
    Task(folder, folder.rpartition("/")[2], {"time_min": 60, "signal_delay_s": 60})()
    assert asked == [worker]
