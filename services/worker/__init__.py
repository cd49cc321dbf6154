"""The worker service: an engine, and the streams that tie it to gateways, schedulers and the cache service."""
