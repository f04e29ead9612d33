"""MLflow: the run that training logs to, and the registry of finished models."""
