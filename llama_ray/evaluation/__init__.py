"""Scores of a model: bits per byte of texts, tasks of lm-evaluation-harness, and which scores may be compared."""
