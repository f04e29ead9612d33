"""One training run, on any torch process group; imports neither Ray nor MLflow."""
