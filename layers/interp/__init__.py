"""Recurrent states at chosen positions, and the delta rule as an attention matrix."""
