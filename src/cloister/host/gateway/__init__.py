"""The HTTP front door: service document, forwarding by pool, health, metrics."""
