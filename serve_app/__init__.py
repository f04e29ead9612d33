"""The Ray Serve application: OpenAI-compatible HTTP in front of the generation engine."""
