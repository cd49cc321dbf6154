"""The only place that knows Redis' shape: key names, Lua scripts, the request queue and its leases."""
