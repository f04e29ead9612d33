"""Tensor parallelism: one model on several ranks, with their processes, collectives and shares of the weights."""
