"""One generation engine, in one process: prompts in, text or a stream of text out."""
