"""Ciphertext at rest: content-addressed blobs and versioned records."""
