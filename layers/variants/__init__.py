"""Variants of the layers that no released model uses."""
