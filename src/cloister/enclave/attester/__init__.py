"""Collects evidence from the machine that an enclave runs on."""
