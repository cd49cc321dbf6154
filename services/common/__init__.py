"""What every service stands on: settings, serving, channels, errors, telemetry, block names, and Redis."""
