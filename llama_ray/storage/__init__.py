"""Paths, URIs and the directories of runs."""
