"""Benchmarks: what protection costs, measured beside what it is compared with."""
