"""The cache service: the index of who holds which KV blocks, and a place to keep their bytes."""
