"""Gives queued requests to workers: takes jobs from Redis as workers grant credits, and offers each a placement."""
