"""Streams to schedulers and workers: placements, executions, and what they show of both."""
