"""Constrained output: JSON of a schema, or a regular expression, followed by processes that can be ended."""
