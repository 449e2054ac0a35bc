"""The key service enclave: statements, model keys, releases, log."""
