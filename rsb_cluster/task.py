"""The name by which jobs wait in queues that were submitted before the package had folders: ``rsb_cluster.task.Task``.

submitit pickles a task by the name of its class. Nothing else may use this one.
"""

from rsb_cluster.node.task import Task

__all__ = ["Task"]
