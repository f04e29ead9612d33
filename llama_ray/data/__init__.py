"""Text -> tokenizer -> token shards -> batches."""
