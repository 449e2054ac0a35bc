"""The vendors' root certificates, embedded: what production trusts can only change with the code."""
