"""The operator's side, untrusted: it sees ciphertext only."""
