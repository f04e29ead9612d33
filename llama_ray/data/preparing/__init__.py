"""Text to a tokenised dataset, on Ray."""
