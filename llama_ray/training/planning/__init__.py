"""Memory, traffic and time of a run, traced without its machines."""
