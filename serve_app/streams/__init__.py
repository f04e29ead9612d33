"""How the tokens of all requests travel from a model replica to an API process: one connection, a frame a step."""
