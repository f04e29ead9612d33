"""Sharded checkpoints, written while training continues; a run resumes from them exactly."""
