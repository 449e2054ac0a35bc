"""Shared vocabulary of every principal: pure, no I/O, no clock; ``now`` is always an argument."""
