"""What a model carries between calls, its files, and the rollback log."""

from layers.deprecation import renamed_names
from qwen3next.cache.hybrid import HybridCache

__all__ = ["HybridCache"]

__getattr__ = renamed_names(
    __name__,
    {
        "Cache": "qwen3next.cache.hybrid.HybridCache",
        "new_cache": "qwen3next.cache.hybrid.new_cache",
        "common_prefix": "qwen3next.cache.hybrid.common_prefix",
        "Mark": "qwen3next.cache.snapshot.Snapshot",
    },
)
