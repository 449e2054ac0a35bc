"""Everything that runs inside a TEE and is measured."""
