"""The options of the tests' submits to a real Slurm."""

DIGITS = (
    "--recipe", "digits", "--model", "test_resnet", "--job", "slurm-cpu", "--set", "schedule.epochs=4",
    "--set", "job.log_every_steps=1", "--set", "job.tasks_per_node=2",
)  # fmt: skip
