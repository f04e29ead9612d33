"""MLflow's side of a training run: the run it logs to, and the registry that its checkpoints end in."""
