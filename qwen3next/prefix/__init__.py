"""Caches of prompts' beginnings, kept in memory and on disk."""
