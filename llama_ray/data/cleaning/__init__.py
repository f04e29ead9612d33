"""Which texts are fit to train on: filters, languages, duplicates, what is in an evaluation."""
