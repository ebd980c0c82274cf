"""A cache as it was at some point: what snapshots, forks and files hold."""

from dataclasses import dataclass

from torch import Tensor

from layers.state.kv_cache import KVState
from qwen3next.cache.rollback_log import State


@dataclass
class Mark:
    """A cache as it was at some point. States are shared with the cache, which replaces and never changes them.

    Attributes:
        tokens: (b, n) the token ids seen, n the longest row's; the others as in HybridCache.
    """

    lengths: tuple[int, ...]
    layers: list[State]
    mtp: KVState | None
    tokens: Tensor
    hidden: Tensor | None
    last_logits: Tensor | None

    def storages(self) -> dict[int, int]:
        """Address and bytes of the memory that this keeps alive, token ids and logits left out."""
        found: dict[int, int] = {}
        for s in self.layers if self.mtp is None else [*self.layers, self.mtp]:
            if isinstance(s, KVState):
                found |= s.storages
            else:
                found |= {m.data_ptr(): m.nbytes() for x in (s.conv, s.memory) if (m := x.untyped_storage()).nbytes()}
        return found
