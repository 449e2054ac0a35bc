"""Authenticated containers: sealed models (chunked, seekable) and sealed records."""
