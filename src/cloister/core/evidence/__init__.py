"""Evidence of each TEE as frozen types: bytes to values and back; no trust decision is taken here."""
