"""The snapshot of a cache, used by snapshots, forks and files."""

from dataclasses import dataclass

from torch import Tensor

from layers.state.kv_cache import KVCache
from qwen3next.cache.rollback_log import State


@dataclass
class Snapshot:
    """A snapshot of a cache. It shares states with the cache, which replaces states and never modifies them in place.

    Attributes:
        tokens: (b, n) the token ids of the cache, n being the longest row's number; others as in HybridCache.
    """

    lengths: tuple[int, ...]
    layers: list[State]
    mtp: KVCache | None
    tokens: Tensor
    hidden: Tensor | None
    last_logits: Tensor | None

    def storages(self) -> dict[int, int]:
        """Address → bytes of the storages that this keeps alive, without token ids and logits."""
        found: dict[int, int] = {}
        for s in self.layers if self.mtp is None else [*self.layers, self.mtp]:
            if isinstance(s, KVCache):
                found |= s.storages
            else:
                found |= {
                    m.data_ptr(): m.nbytes() for x in (s.conv, s.recurrent) if (m := x.untyped_storage()).nbytes()
                }
        return found
