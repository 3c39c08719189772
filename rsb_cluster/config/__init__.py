"""The files that users write: recipes, jobs and sweeps."""
