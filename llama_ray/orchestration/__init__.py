"""Ray Train, and what ties a run to MLflow and the registry."""
