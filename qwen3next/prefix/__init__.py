"""Prefix caching: reuse the caches of prompt prefixes, in memory and on disk."""
