"""How a model is divided among workers, recomputed and compiled."""
