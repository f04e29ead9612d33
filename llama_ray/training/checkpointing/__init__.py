"""Sharded checkpoints: written beside the training, exact on resume."""
