"""Routed experts whose weights are int8, on disk, or in a cache."""
