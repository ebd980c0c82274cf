"""The sparse mixture of experts with a shared expert."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from layers.autocast import backward_without_autocast
from layers.backends import choose, choose_for, generation
from layers.grouped_linear import grouped_linear, runs, wide
from layers.hook_point import HookPoint
from layers.linear import Linear, linear, spans, under_autocast
from layers.mlp import SwiGLU, activate
from layers.native import functions as native
from layers.native import ops
from layers.norm import at_least_fp32
from layers.recompute import recomputing

GATHERED = 64  # choices whose weights are copied out together, where that keeps the host out of it
TOKENS = 2048  # at a time: transient memory is bounded, and so is what falls out of the caches


class RouterStats(NamedTuple):
    """What a router did with the real tokens of a call.

    load: (e,) share of the tokens' choices that went to each expert; sums to 1, even is 1 / e.
    balance: load-balancing loss e · Σ_i f_i p_i, f_i the share of tokens that chose expert i, p_i its mean
        probability; even is top_k. Source: arXiv:2101.03961 eq. 4 to 6, with f over all k choices.
    z: mean over tokens of logsumexp(logits)². Source: arXiv:2202.08906 eq. 5.
    """

    load: Float[Tensor, "*layers e"]
    balance: Float[Tensor, "*layers"]
    z: Float[Tensor, "*layers"]


def swiglu(
    x: Tensor, gate_up: Tensor, down: Tensor, *, linear_backend: str = "auto", elementwise_backend: str = "auto"
) -> Tensor:
    """One expert's feed-forward of rows x."""
    gate, up = linear(x, gate_up, backend=linear_backend).chunk(2, dim=-1)
    return linear(activate(gate, up, backend=elementwise_backend), down, backend=linear_backend)


# What experts are, wherever their weights lie, is a function of e and the rows routed to it.
Expert = Callable[[int, Tensor], Tensor]


def loop(x: Tensor, weights: Tensor, indices: Tensor, expert: Expert) -> Tensor:
    """The definition: every expert in use is asked once, in rising order; weighed and summed in fp32."""
    y = torch.zeros_like(at_least_fp32(x))
    for e in sorted(set(_numbers(indices))):
        token, slot = (indices == e).nonzero(as_tuple=True)
        out = at_least_fp32(expert(e, x[token])) * weights[token, slot, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y.to(x.dtype)


def one_token(x: Tensor, weights: Tensor, indices: Tensor, expert: Expert) -> Tensor:
    """One token's experts in the order of its choices; sorting and grouping would cost more than the products."""
    y = torch.zeros_like(x)
    for slot, e in enumerate(_numbers(indices[0])):
        y = torch.addcmul(y, expert(e, x), weights[:, slot, None])
    return y


def _numbers(indices: Tensor) -> list[int]:
    """Numbers of experts, none of which counts from the end."""
    numbers = indices.flatten().tolist()
    if numbers and min(numbers) < 0:
        raise ValueError(f"A token is routed to the expert {min(numbers)}: experts are counted from 0.")
    return numbers


def grouped_on_device(x: Tensor) -> bool:
    """Whether torch's grouped_mm has a kernel for such tensors; else it asks the host where its groups end."""
    return x.dtype == torch.bfloat16 and generation(x.device) >= 9


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which products of x are made: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Experts(nn.Module):
    """e SwiGLU feed-forwards in two stacked tensors: gate rows above up rows.

    Attributes:
        linear_backend, elementwise_backend: how their products and activations run; `backend` is for the rest.
    """

    def __init__(self, width: int, inner: int, count: int, *, backend: str = "auto"):
        super().__init__()
        self.backend, self.linear_backend, self.elementwise_backend = backend, "auto", "auto"
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(
        self, x: Float[Tensor, "n width"], weights: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n width"]:
        """Σ_j weights[:, j] · expert[indices[:, j]](x).

        Raises: ValueError for an unknown backend; RuntimeError where a named backend cannot run here.
        """
        tracing = torch.compiler.is_compiling()
        if self.backend == "auto" and not torch.is_grad_enabled() and not (tracing and x.device.type == "cpu"):
            if x.device.type == "cpu" and x.shape[0] == 1:
                return one_token(x, weights, indices, self._expert)
            if x.device.type != "cpu" and indices.numel() <= GATHERED and not self._grouped_serves(x):
                return self._gathered(x, weights, indices)
        chosen = choose_for("experts", self.chosen, x.device, _product_dtype(x))
        if chosen == "cpp" and tracing:  # whose graph serves any number of rows
            return self._sorted(x, weights, indices)
        if chosen == "cpp":
            y = [self._sorted(x[a:b], weights[a:b], indices[a:b]) for a, b in spans(len(x), TOKENS)]
            return y[0] if len(y) == 1 else torch.cat(y)
        return self._grouped(x, weights, indices) if chosen == "grouped" else loop(x, weights, indices, self._expert)

    @property
    def chosen(self) -> str:
        """The backend asked for; on "auto", "loop" for rows that grouped_mm refuses: it wants multiples of 16 bytes."""
        odd = any(rows * self.down_proj.element_size() % 16 for rows in self.down_proj.shape[1:])
        return "loop" if odd and self.backend == "auto" else self.backend

    def _expert(self, e: int, x: Tensor) -> Tensor:
        chosen = {"linear_backend": self.linear_backend, "elementwise_backend": self.elementwise_backend}
        return swiglu(x, self.gate_up_proj[e], self.down_proj[e], **chosen)

    def _sorted(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """As `_grouped`, sorted and summed in C++."""
        dtype = x.dtype
        backend = under_autocast(x, self.linear_backend)
        x = x.to(_product_dtype(x))
        token, places, ends = ops.route(indices.contiguous(), self.gate_up_proj.shape[0])
        one_by_one = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if one_by_one and choose("linear", backend, x) == "onednn":
            out = x.new_empty(len(token), x.shape[1])
            for e, run in runs(ends):  # an expert at a time, whose rows stay in a core's caches
                more, here = wide(run, len(out))
                out[run] = self._expert(e, x.index_select(0, token[more]))[here]
        else:
            rows = native.gather(x, token, places)
            gate, up = grouped_linear(rows, self.gate_up_proj, ends, backend=backend).chunk(2, dim=-1)
            inner = activate(gate, up, backend=self.elementwise_backend)
            out = grouped_linear(inner, self.down_proj, ends, backend=backend)
        return native.combine(out, weights.float().contiguous(), places, exact=dtype == torch.float32)

    def _grouped(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert, so that each expert's rows are neighbours; no host sync."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_experts(indices, len(self.gate_up_proj))
        order = indices.flatten().argsort(stable=True)
        token = order // indices.shape[1]
        # Not bincount, which asks a GPU for the largest index before it counts.
        experts = torch.arange(self.gate_up_proj.shape[0], device=x.device)
        ends = torch.searchsorted(indices.flatten()[order], experts, right=True, out_int32=True)
        backend = self.linear_backend
        gate, up = grouped_linear(x[token], self.gate_up_proj, ends, backend=backend).chunk(2, dim=-1)
        inner = activate(gate, up, backend=self.elementwise_backend)
        out = at_least_fp32(grouped_linear(inner, self.down_proj, ends, backend=backend))
        out = out * weights.flatten()[order, None]
        return torch.zeros_like(at_least_fp32(x)).index_add(0, token, out).to(x.dtype)

    def _grouped_serves(self, x: Tensor) -> bool:
        return self.chosen != "loop" and grouped_on_device(x)

    def _gathered(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """A few tokens with a copy of every choice's weights: more to read than `_grouped`, and no host sync either."""
        chosen, (n, k) = indices.flatten(), indices.shape
        rows = x.repeat_interleave(k, dim=0, output_size=n * k)[..., None]
        rows = rows.to(_product_dtype(x))
        gate, up = (self.gate_up_proj[chosen].to(rows.dtype) @ rows).chunk(2, dim=1)
        out = (self.down_proj[chosen].to(rows.dtype) @ activate(gate, up, backend=self.elementwise_backend)).view(
            n, k, -1
        )
        return (at_least_fp32(out) * weights[..., None]).sum(1).to(x.dtype)

    def extra_repr(self) -> str:
        e, width, inner = self.down_proj.shape
        return f"{e} x ({width} -> {inner} -> {width})"


def top_experts(logits: Float[Tensor, "*batch e"], k: int) -> Int[Tensor, "*batch k"]:
    """Numbers of the k largest logits, the largest first; of equal ones the lower number first.

    bf16 logits are often equal, and torch's topk leaves open which of them it takes: another choice on another device,
    or for another number of tokens. Compiled decoding follows the same rule.
    """
    if logits.dtype == torch.float64:
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # One integer a logit, in the order of the rule: the float's bits, which for negative ones count downwards, and then
    # the expert's number from the end. Adding 0 makes -0 and 0 equal.
    bits = (logits.detach().float() + 0.0).view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    e = logits.shape[-1]
    return ((rising << 32) | torch.arange(e - 1, -1, -1, device=logits.device)).topk(k, dim=-1).indices


def check_experts(indices: Tensor, count: int) -> None:
    """Raises: ValueError for indices that name no expert of `count`."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(
            f"Tokens are routed to the experts {int(indices.min())} to {int(indices.max())}, "
            f"and there are 0 to {count - 1}."
        )


class SparseMoE(nn.Module):
    """A router picks top_k of the experts for every token; a shared expert serves all, scaled by its own gate.

    With `shared_inner` 0 there is no shared expert.

    Router: linear → fp32 softmax over **all** experts → top-k → renormalise → cast, in this order. Of experts with
    equal logits the lower number comes first.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        inner: int,
        shared_inner: int,
        renormalise: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"Cannot route to {top_k} of {experts} experts: choose 1 to {experts}.")
        self.top_k, self.renormalise = top_k, renormalise
        self.router = Linear(width, experts, bias=False)
        self.experts: nn.Module = Experts(width, inner, experts, backend=backend)
        self.shared_expert = SwiGLU(width, shared_inner) if shared_inner else None
        if self.shared_expert is not None:
            self.shared_expert_gate = Linear(width, 1, bias=False)

        self.hook_router_logits, self.hook_router_weights = HookPoint("b t e"), HookPoint("b t top_k")
        self.hook_router_indices = HookPoint("b t top_k", dtype="int64")
        self.hook_expert_out = HookPoint("b t top_k width")  # each choice's row before its weight
        if self.shared_expert is not None:
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
            routed = x.to(_dtype_of(self.router, x.dtype))
            logits = self.hook_router_logits(self.router(routed))
            probabilities = at_least_fp32(logits).softmax(-1)
        backward_without_autocast((logits,), (routed,))
        indices = top_experts(logits, self.top_k)
        weights = probabilities.gather(-1, indices)
        indices = self.hook_router_indices(indices)
        if self.hook_router_indices.active:
            check_experts(indices, logits.shape[-1])
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = self.hook_router_weights(weights.to(x.dtype))
        y = recomputing(self, x, weights, indices, run=self._expert_sum)  # of the same choices, whatever is made again
        return y, router_stats(logits, probabilities, indices, mask) if stats else None

    def _expert_sum(
        self, x: Float[Tensor, "b t width"], weights: Float[Tensor, "b t k"], indices: Int[Tensor, "b t k"]
    ) -> Float[Tensor, "b t width"]:
        """The chosen experts, weighed, and the shared one."""
        if self.hook_expert_out.active:
            routed = self._choice_by_choice(x, weights, indices)
        else:
            routed = self.experts(x.flatten(0, 1), weights.flatten(0, 1), indices.flatten(0, 1)).view_as(x)
        y = routed
        if self.shared_expert is not None:
            shared = self.hook_shared_out(self.shared_expert(x))
            gate = self.hook_shared_gate(self.shared_expert_gate(x).sigmoid())
            y = routed + gate * shared
        return y

    def _choice_by_choice(
        self, x: Float[Tensor, "b t width"], weights: Float[Tensor, "b t k"], indices: Int[Tensor, "b t k"]
    ) -> Float[Tensor, "b t width"]:
        """What `experts` gives, from rows that pass `hook_expert_out`, for experts of any kind.

        Rows are added in the order in which `experts` adds them, so that rounding is the same.
        """
        flat, one, top_k = x.flatten(0, 1), torch.ones_like(weights[:1, :1, 0]), indices.shape[-1]
        single = len(flat) == 1 and not torch.is_grad_enabled() and getattr(self.experts, "backend", "auto") == "auto"
        if single:  # a choice at a time takes the single token's path
            rows = torch.stack([self.experts(flat, one, chosen) for chosen in indices[0].split(1, dim=1)], dim=1)
        else:
            repeated = flat.repeat_interleave(top_k, dim=0)
            rows = self.experts(repeated, one.expand(len(repeated), 1), indices.reshape(-1, 1))
        rows = self.hook_expert_out(rows.view(*indices.shape, -1))
        if not single:
            order = indices.argsort(dim=-1, stable=True)
            rows = rows.gather(2, order[..., None].expand_as(rows))
            weights = weights.gather(2, order)
        y = torch.zeros_like(x if single else at_least_fp32(x))
        for row, weight in zip(rows.unbind(2), weights.split(1, dim=-1), strict=True):
            y = torch.addcmul(y, row, weight) if single else y + at_least_fp32(row) * weight
        return y.to(x.dtype)


def _dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that a linear map computes in, wherever an adapter around it keeps its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return weight.dtype if weight is not None and weight.is_floating_point() else otherwise


def router_stats(
    logits: Float[Tensor, "b t e"],
    probabilities: Float[Tensor, "b t e"],
    indices: Int[Tensor, "b t k"],
    mask: Bool[Tensor, "b t"] | None,
) -> RouterStats:
    """Load, balance loss and z loss of one layer, over the tokens that the mask keeps."""
    top_k, e = indices.shape[-1], logits.shape[-1]
    real = torch.ones(logits.shape[:2], device=logits.device) if mask is None else mask.float()
    tokens = real.sum().clamp(min=1)
    choices = real[..., None].expand_as(indices).flatten()
    chosen = torch.zeros(e, device=logits.device).index_add(0, indices.flatten(), choices)
    if mask is not None:
        probabilities = probabilities.masked_fill(~mask[..., None], 0.0)
        logits = logits.masked_fill(~mask[..., None], 0.0)
    mean_probability = (probabilities * real[..., None]).sum((0, 1)) / tokens
    balance = e * (chosen / tokens * mean_probability).sum()
    z = (at_least_fp32(logits).logsumexp(-1).square() * real).sum() / tokens
    return RouterStats(chosen / (tokens * top_k), balance, z)
