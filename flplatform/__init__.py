"""Federated learning for sites that may not pool their data."""

__version__ = "0.1.0"
