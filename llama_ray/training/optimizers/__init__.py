"""AdamW and Muon, their learning rates, and the loss scaler of fp16."""
