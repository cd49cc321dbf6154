"""Answers as they are made, written down for a reader who comes back, and leased from Redis until they end."""
