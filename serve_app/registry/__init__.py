"""Which versions are served: the one place that follows the MLflow registry, and what it tells the others."""
