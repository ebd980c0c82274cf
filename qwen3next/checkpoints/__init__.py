"""Checkpoint folders: read, checked, written, converted, compared."""
