"""Which implementations a model runs, and what it computes again in the backward pass."""

from typing import Any, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor, nn

from layers.cross_entropy import linear_cross_entropy, linear_cross_entropy_and_z
from layers.dispatch.attached import attached
from layers.dispatch.backends import choose_for, current_name
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.mlp import SwiGLU
from layers.moe import Experts
from layers.norm import GatedRMSNorm, RMSNorm
from layers.quantised.experts import QuantisedExperts
from layers.quantised.linear import QuantisedLinear
from layers.segments import Segments
from qwen3next.block import Block
from qwen3next.config import ModelConfig
from qwen3next.decoding.plan import PlanCache
from qwen3next.generation.prefill import Prefilling
from qwen3next.losses import Counts, LossSums, loss_counts, loss_sums


class Backends(Prefilling):
    """The model with `set_backend` and `recompute`, and a loss that never holds all logits."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.cross_entropy_backend = "auto"

    def _summed_cross_entropy(
        self, hidden: Tensor, place: Tensor, target: Tensor, segments: Segments, hook: HookPoint, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        head = self.lm_head
        if not _plain(head) or hook.active:
            return super()._summed_cross_entropy(hidden, place, target, segments, hook, z_loss)
        chosen = {"backend": self.cross_entropy_backend, "linear_backend": head.backend}
        if z_loss:
            return linear_cross_entropy_and_z(hidden[place], head.weight, target, z_loss=z_loss, **chosen)
        loss = linear_cross_entropy(hidden[place], head.weight, target, **chosen)
        return loss, torch.zeros_like(loss)

    def loss_sums(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        segments: Segments | None = None,
        labels: Tensor | None = None,
        mtp_depths: int = 1,
    ) -> LossSums:
        """The losses of `loss` as sums, for a batch that is computed in parts. Arguments are the same.

        qwen3next/losses.py tells how sums of parts become the losses of the whole.
        """
        return loss_sums(self, input_ids, segments=segments, labels=labels, mtp_depths=mtp_depths)

    def loss_counts(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        segments: Segments | None = None,
        labels: Tensor | None = None,
        mtp_depths: int = 1,
    ) -> Counts:
        """The counts of `loss_sums` alone: a forward pass without the head."""
        return loss_counts(self, input_ids, segments=segments, labels=labels, mtp_depths=mtp_depths)

    def set_backend(self, operation: str, name: str) -> None:
        """Choose how an operation of `q.explain` runs in every layer, or as a whole; "auto" picks again.

        Args:
            operation: "linear" (products with weights, the experts' too), "elementwise" (norms and activations,
                likewise), "delta_rule" (the convolution follows it), "attention", "experts" (what surrounds their
                products, and with "cpp" these too unless "linear" was named), "decode" or "cross_entropy".

        Raises: ValueError for an unknown operation or backend; RuntimeError where a named one cannot run here.
        """
        kinds: dict[str, Any] = {
            "linear": (Linear, QuantisedLinear),
            "elementwise": (RMSNorm, GatedRMSNorm, SwiGLU),
            "delta_rule": GatedDeltaNet,
            "attention": GatedAttention,
            "experts": (Experts, QuantisedExperts),
        }
        attribute = f"{operation}_backend"  # of modules that do several kinds of things
        if operation not in kinds and operation not in ("decode", "cross_entropy"):
            known = ", ".join((*kinds, "decode", "cross_entropy"))
            raise ValueError(f"There is no operation {operation!r} to choose for: {known}.")
        with torch.no_grad():
            choose_for(operation, name := current_name(name), self.device, self.dtype)
        self.plan_cache = PlanCache()  # look anew at the next step
        if operation not in kinds:
            setattr(self, attribute, name)
            return
        if not any(isinstance(module, kinds[operation]) for module in self.modules()):
            raise ValueError(f"This model has no {operation} of its own whose backend could be chosen: see q.explain.")
        for module in self.modules():
            if isinstance(module, kinds[operation]):
                setattr(module, "backend", name)  # noqa: B010
            elif hasattr(module, attribute):
                setattr(module, attribute, name)

    def recompute(self, *parts: str) -> None:
        """Make these again in the backward pass instead of keeping what they computed; in place of what was chosen.

        Gradients are the same to the bit. The router is not run again: experts are those that it chose, and statistics
        count once. Layers with hooks at their points keep everything.

        Args:
            parts: "linear_attention", "full_attention" (mixers of that kind), "mlp" (feed-forwards, experts); the MTP
                layer's too. None at all: nothing is made again.
        Raises: ValueError for a part that the model does not have.
        """
        found: dict[str, list[nn.Module]] = {"linear_attention": [], "full_attention": [], "mlp": []}
        for block in self.modules():
            if isinstance(block, Block):
                linear = block.mixer == "linear_attention"
                found[block.mixer].append(block.linear_attn if linear else block.self_attn)
                found["mlp"].append(block.mlp)
        known = [part for part, modules in found.items() if modules]
        for part in parts:
            if part not in known:
                raise ValueError(f"This model has no {part!r} to compute again: choose of {', '.join(known)}.")
        for part, modules in found.items():
            for module in modules:
                setattr(module, "recomputed", part in parts)  # noqa: B010


def _plain(head: nn.Module) -> TypeGuard[Linear]:
    """Whether its product with the weight is all that a call of it would do."""
    return (
        type(head) is Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and not attached(head)
    )
