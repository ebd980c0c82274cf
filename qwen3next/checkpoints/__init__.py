"""Checkpoint folders: read, verify, write, convert and compare them."""
