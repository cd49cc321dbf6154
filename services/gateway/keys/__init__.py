"""API keys, and what they allow: models, limits, budgets, prices."""
