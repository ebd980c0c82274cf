"""Prefill, sampling and generated text."""
