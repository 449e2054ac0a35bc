"""Moves bytes and knows no keys: the compact HTTP/1.1 front and client for ``/ohttp``."""
