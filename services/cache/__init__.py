"""The cache service: the index of which worker holds which KV blocks."""
