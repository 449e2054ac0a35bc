"""Starts enclaves on one host and gives each its one way out."""
