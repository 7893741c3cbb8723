"""Adapters between a framework's model and named arrays.

Each module has `arrays_of` and `load_arrays` and needs its framework only when they are called.
"""
