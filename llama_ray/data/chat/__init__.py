"""Conversations as the text that a model sees."""
