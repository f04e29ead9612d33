"""Text -> documents -> tokenizer -> token shards -> batches."""
