"""Which samples are trained on, in which order."""
