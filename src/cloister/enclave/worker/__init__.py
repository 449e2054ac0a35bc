"""The worker enclave: models, sessions, requests."""
