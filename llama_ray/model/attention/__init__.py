"""How queries attend to keys and values: over a batch, within documents, or by what generation hands in."""
