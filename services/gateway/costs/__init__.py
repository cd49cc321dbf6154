"""What requests cost in measured time of machines, added up per request, model, key and day: see docs/costs.md."""
