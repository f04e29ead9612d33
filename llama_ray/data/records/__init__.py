"""The texts in a file."""
