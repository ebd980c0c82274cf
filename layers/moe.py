"""The sparse mixture of experts with a shared expert."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from layers.deprecation import renamed_arguments
from layers.dispatch.autocast import as_multiplied
from layers.dispatch.backends import run
from layers.dispatch.backward_autocast import backward_without_autocast
from layers.dispatch.registry import implements
from layers.expert_choices import check_experts, choice_by_choice, expert_numbers, top_experts
from layers.hook_point import HookPoint
from layers.linear import Linear, dtype_of, linear
from layers.mlp import SwiGLU, activate
from layers.norm import at_least_fp32
from layers.recompute import recomputing

# What an expert is, wherever its weights lie: a function of its number and the rows routed to it.
Expert = Callable[[int, Tensor], Tensor]


class RouterStats(NamedTuple):
    """What a router did with the real tokens of a call, as sums over them: sums of calls add up, means do not.

    choices: (e,) how often each expert was chosen; without gradient.
    probabilities: (e,) each expert's probability.
    squared_logsumexp: logsumexp(logits)².
    tokens: how many tokens.
    """

    choices: Float[Tensor, "*layers e"]
    probabilities: Float[Tensor, "*layers e"]
    squared_logsumexp: Float[Tensor, "*layers"]
    tokens: Float[Tensor, "*layers"]

    @property
    def load(self) -> Float[Tensor, "*layers e"]:
        """Share of the tokens' choices that went to each expert; sums to 1, even is 1 / e."""
        return self.choices / self.choices.sum(-1, keepdim=True).clamp(min=1)

    @property
    def probability(self) -> Float[Tensor, "*layers e"]:
        """Mean probability of each expert."""
        return self.probabilities / self.tokens.clamp(min=1)[..., None]

    @property
    def balance(self) -> Float[Tensor, "*layers"]:
        """Load-balancing loss e · Σ_i f_i p_i, f_i the share of tokens that chose expert i, p_i its mean probability.

        Even is top_k. Source: arXiv:2101.03961 eq. 4 to 6, with f over all k choices.
        """
        chosen = self.choices / self.tokens.clamp(min=1)[..., None]
        return self.choices.shape[-1] * (chosen * self.probability).sum(-1)

    @property
    def z(self) -> Float[Tensor, "*layers"]:
        """Mean over tokens of logsumexp(logits)². Source: arXiv:2202.08906 eq. 5."""
        return self.squared_logsumexp / self.tokens.clamp(min=1)


def swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, *, linear_backend: str = "auto", elementwise_backend: str = "auto"
) -> Tensor:
    """One expert's feed-forward of rows x."""
    gate, up = linear(x, gate_up, backend=linear_backend).chunk(2, dim=-1)
    return linear(activate(gate, up, backend=elementwise_backend), down, backend=linear_backend)


def loop(x: Tensor, weights: Tensor, indices: Tensor, expert: Expert) -> Tensor:
    """The definition: every expert in use is called once, in rising order; weighted and summed in fp32."""
    y = torch.zeros_like(at_least_fp32(x))
    for e in sorted(set(expert_numbers(indices))):
        token, choice = (indices == e).nonzero(as_tuple=True)
        out = at_least_fp32(expert(e, x[token])) * weights[token, choice, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y.to(x.dtype)


@implements("experts", "loop", definition=True)
def in_turn(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, **backends: str) -> Tensor:
    return loop(x, weights, indices, lambda e, rows: swiglu(rows, gate_up[e], down[e], **backends))


class Experts(nn.Module):
    """e SwiGLU feed-forwards in two stacked tensors: gate rows above up rows.

    Attributes:
        backend: of "experts": "loop", "grouped", "gathered", "sorted" or "cpp" (both on a CPU); "auto" picks.
        linear_backend, elementwise_backend: of their products and activations.
    """

    @renamed_arguments(width="hidden_size", inner="intermediate_size")
    def __init__(self, hidden_size: int, intermediate_size: int, count: int, *, backend: str = "auto"):
        super().__init__()
        self.backend, self.linear_backend, self.elementwise_backend = backend, "auto", "auto"
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, intermediate_size))

    def forward(
        self, x: Float[Tensor, "n width"], weights: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n width"]:
        """Σ_j weights[:, j] · expert[indices[:, j]](x).

        Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
        """
        matrices = self.gate_up_proj, self.down_proj
        backends = {"linear_backend": self.linear_backend, "elementwise_backend": self.elementwise_backend}
        return run("experts", self.backend, as_multiplied(x), x, weights, indices, *matrices, **backends)

    def extra_repr(self) -> str:
        e, hidden_size, intermediate_size = self.down_proj.shape
        return f"{e} x ({hidden_size} -> {intermediate_size} -> {hidden_size})"


class SparseMoE(nn.Module):
    """A router picks top_k of the experts for every token; a shared expert serves all, scaled by its own gate.

    With `shared_intermediate_size` 0 there is no shared expert.

    Router: linear → fp32 softmax over **all** experts → top-k → norm_topk_prob → cast, in this order. Of experts with
    equal logits the lower number comes first.
    """

    @renamed_arguments(
        width="hidden_size",
        inner="intermediate_size",
        shared_inner="shared_intermediate_size",
        renormalise="norm_topk_prob",
    )
    def __init__(
        self,
        hidden_size: int,
        *,
        experts: int,
        top_k: int,
        intermediate_size: int,
        shared_intermediate_size: int,
        norm_topk_prob: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"Cannot route to {top_k} of {experts} experts: choose 1 to {experts}.")
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.router = Linear(hidden_size, experts, bias=False)
        self.experts: nn.Module = Experts(hidden_size, intermediate_size, experts, backend=backend)
        self.shared_expert = SwiGLU(hidden_size, shared_intermediate_size) if shared_intermediate_size else None

        self.hook_router_logits, self.hook_router_weights = HookPoint("b t e"), HookPoint("b t top_k")
        self.hook_router_indices = HookPoint("b t top_k", dtype="int64")
        self.hook_expert_out = HookPoint("b t top_k width")  # each choice's row before its weight
        if self.shared_expert is not None:
            self.shared_expert_gate = Linear(hidden_size, 1, bias=False)
            self.hook_shared_gate = HookPoint("b t 1")
            self.hook_shared_out = HookPoint("b t width")  # before its gate

    def forward(
        self, x: Float[Tensor, "b t width"], *, mask: Bool[Tensor, "b t"] | None = None, stats: bool = True
    ) -> tuple[Float[Tensor, "b t width"], RouterStats | None]:
        """Feed forward; and what the router did with the tokens where `mask` is True (all, if None), if `stats`.

        Others stand for zeros, whatever they hold.
        """
        x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        with torch.autocast(x.device.type, enabled=False):  # in mixed precision the router stays fp32
            routed = x.to(dtype_of(self.router, x.dtype))
            logits = self.hook_router_logits(self.router(routed))
            probabilities = at_least_fp32(logits).softmax(-1)
        backward_without_autocast((logits,), (routed,))
        indices = top_experts(logits, self.top_k)
        weights = probabilities.gather(-1, indices)
        indices = self.hook_router_indices(indices)
        if self.hook_router_indices.active:
            check_experts(indices, logits.shape[-1])
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = self.hook_router_weights(weights.to(x.dtype))
        y = recomputing(self, x, weights, indices, run=self._expert_sum)  # of the same choices, whatever is made again
        return y, router_stats(logits, probabilities, indices, mask) if stats else None

    def _expert_sum(
        self, x: Float[Tensor, "b t width"], weights: Float[Tensor, "b t k"], indices: Int[Tensor, "b t k"]
    ) -> Float[Tensor, "b t width"]:
        """The chosen experts, weighted, and the shared one."""
        if self.hook_expert_out.active:
            y = choice_by_choice(self.experts, x, weights, indices, self.hook_expert_out)
        else:
            y = self.experts(x.flatten(0, 1), weights.flatten(0, 1), indices.flatten(0, 1)).view_as(x)
        if self.shared_expert is None:
            return y
        shared = self.hook_shared_out(self.shared_expert(x))
        return y + self.hook_shared_gate(self.shared_expert_gate(x).sigmoid()) * shared


def router_stats(
    logits: Float[Tensor, "b t e"],
    probabilities: Float[Tensor, "b t e"],
    indices: Int[Tensor, "b t k"],
    mask: Bool[Tensor, "b t"] | None,
) -> RouterStats:
    """The sums of one layer over the tokens that the mask keeps."""
    real = torch.ones(logits.shape[:2], device=logits.device) if mask is None else mask.float()
    ones = real[..., None].expand_as(indices).flatten()
    choices = torch.zeros(logits.shape[-1], device=logits.device).index_add(0, indices.flatten(), ones)
    if mask is not None:
        probabilities, logits = (x.masked_fill(~mask[..., None], 0.0) for x in (probabilities, logits))
    squared = (at_least_fp32(logits).logsumexp(-1).square() * real).sum()
    return RouterStats(choices, (probabilities * real[..., None]).sum((0, 1)), squared, real.sum())
