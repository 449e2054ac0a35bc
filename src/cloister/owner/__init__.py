"""The owner's desk: identity, sealing, signed statements."""
