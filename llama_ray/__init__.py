"""Pre-train, register and serve LLaMA models on Ray."""
