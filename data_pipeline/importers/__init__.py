"""Corpora as they are published, to shards: one module a format."""
