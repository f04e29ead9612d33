"""What measures an HTTP endpoint: a load generator, the servers that it is aimed at, and figures."""
