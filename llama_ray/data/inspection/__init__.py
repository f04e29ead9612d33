"""What is in a dataset, as text and pictures for a terminal."""
