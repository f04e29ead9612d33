"""A tokenised dataset on disk."""
