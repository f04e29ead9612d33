"""Tokenizers in the formats of other libraries, read as `tokenizers` objects that give the same ids."""
