"""Parts of `benchmarks/generate.py`: one model in every format, each system behind one interface, the roofline."""
