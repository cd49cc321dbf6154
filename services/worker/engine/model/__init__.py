"""Models: reading checkpoints, the fast path for Llama-shaped models, the general path through transformers."""
