"""Bytes and keys: shards, samples, the order of samples, batches."""
