"""The `headrace` command: runs the suite on one machine, shows what runs, and fetches models.

Talks to the services over their APIs and through `services.common` only.
"""
