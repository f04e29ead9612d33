"""What `benchmarks/generate.py` is made of: one model in every format, each system behind one interface, the floor."""
