"""From logits to tokens: parameters, penalties, constraints, filters, noise and log-probabilities."""
