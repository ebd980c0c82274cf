"""What decoding reads of a model. `Qwen3Next` has all of it; decoding imports no model."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from layers.linear import Linear
from layers.norm import RMSNorm
from layers.rope import Rotation
from qwen3next.config import ModelConfig


@runtime_checkable
class Decodable(Protocol):
    """A model of blocks between an embedding and a head.

    Attributes:
        mtp: the multi-token prediction layer, which decoding leaves out, or None.
        decode_backend: "auto", "cpp", "graph" or "torch".
        plan_cache: the `PlanCache` (plan.py) where its fast steps are kept.
    """

    _modules: dict[str, nn.Module | None]

    @property
    def config(self) -> ModelConfig: ...
    @property
    def embed_tokens(self) -> nn.Embedding: ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    @property
    def norm(self) -> RMSNorm: ...
    @property
    def lm_head(self) -> Linear: ...
    @property
    def mtp(self) -> nn.Module | None: ...
    @property
    def decode_backend(self) -> str: ...
    @property
    def plan_cache(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...

    def modules(self, /) -> Iterator[nn.Module]: ...
    def parameters(self, /) -> Iterator[nn.Parameter]: ...
    def _rotation(self, positions: Tensor, dtype: torch.dtype, /) -> Rotation: ...


def decoding_modules(model: Decodable) -> list[nn.Module]:
    """The model and all its modules except those of the MTP layer."""
    apart = set() if model.mtp is None else set(model.mtp.modules())
    return [module for module in model.modules() if module not in apart]
