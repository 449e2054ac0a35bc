"""What owners and users share: relying parties on machines of their own. No enclave, no host imports it."""
