"""The simulated TEE platform for laptops and CI. It protects nothing from the machine's administrator."""
