"""Low-rank adapters (LoRA): several over one base model, each for some of the requests in a step."""
