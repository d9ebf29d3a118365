"""Text to batches: sources, tokenizer, token shards, sample order, loader. No torch here."""
