"""The user's side: verification, transport, client."""
