"""Measures the platform against what this machine can do, in one run: `make bench`."""
