"""What a model carries between calls, its files, and the rollback log."""

from qwen3next.cache.hybrid import HybridCache

__all__ = ["HybridCache"]
