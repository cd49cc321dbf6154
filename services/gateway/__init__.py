"""The gateway: OpenAI-compatible HTTP and gRPC in front, schedulers and workers behind."""
