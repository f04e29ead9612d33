"""Batch inference over the cluster with Ray Data: prompts in a file, answers in a file, restartable."""
