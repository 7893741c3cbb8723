"""Durable files: atomic writes, mapped model files, digests.

The one floor that touches the file system on behalf of every floor above it.
"""
