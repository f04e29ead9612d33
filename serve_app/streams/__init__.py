"""How the tokens of all requests travel from a model replica to a process of the API: one connection, a frame a step."""
