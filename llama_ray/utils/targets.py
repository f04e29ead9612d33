"""What the data and the loss agree on."""

IGNORE_INDEX = -100
"""The target of a position that has no loss, as in torch's `cross_entropy`."""
