"""One model over several ranks: the processes, their collectives, and each rank's share of the weights."""
