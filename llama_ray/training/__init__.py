"""One training run, on any torch process group; knows neither Ray nor MLflow."""
