"""Routed experts by other ways than one after another: grouped, sorted in C++, gathered, a token by itself."""

import torch
from torch import Tensor

from layers.cpp import functions as native
from layers.cpp import ops
from layers.dispatch.autocast import product_dtype, under_autocast
from layers.dispatch.availability import generation
from layers.dispatch.backends import choose
from layers.dispatch.registry import implements, on_auto
from layers.expert_choices import check_experts, expert_numbers
from layers.kernels.grouped_linear import grouped_linear, runs, wide
from layers.kernels.linear import spans
from layers.mlp import activate
from layers.moe import Expert, in_turn, swiglu
from layers.norm import at_least_fp32

GATHERED = 64  # choices whose weights are copied out together, where that avoids a wait for the device
TOKENS = 2048  # at a time: transient memory is bounded, and less falls out of the caches


def one_token(x: Tensor, weights: Tensor, indices: Tensor, expert: Expert) -> Tensor:
    """One token's experts in the order of its choices; sorting and grouping would cost more than the products."""
    y = torch.zeros_like(x)
    for slot, e in enumerate(expert_numbers(indices[0])):
        y = torch.addcmul(y, expert(e, x), weights[:, slot, None])
    return y


def grouped_on_device(x: Tensor) -> bool:
    """Whether torch's grouped_mm has a kernel for such tensors; else it asks the host where its groups end."""
    return x.dtype == torch.bfloat16 and generation(x.device) >= 9


def _odd_rows(down: Tensor, dtype: torch.dtype) -> bool:
    """Whether grouped_mm refuses the rows of a matrix in this dtype: it wants multiples of 16 bytes."""
    return any(rows * dtype.itemsize % 16 for rows in down.shape[1:])


def backend_of_experts(backend: str, down: Tensor) -> str:
    """The backend asked for; on "auto", "loop" for rows that grouped_mm refuses, which CPUs do without."""
    return "loop" if backend == "auto" and down.device.type != "cpu" and _odd_rows(down, down.dtype) else backend


def grouped_serves(x: Tensor, down: Tensor, *, dtype: torch.dtype | None = None) -> bool:
    """Whether "grouped" on "auto", with weights in `dtype`, does not wait for the device."""
    return not _odd_rows(down, dtype or down.dtype) and grouped_on_device(x)


def _by_itself(x: Tensor, _w: Tensor, _i: Tensor, _gate_up: Tensor, _down: Tensor, **_backends: str) -> bool:
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.shape[0] == 1


@on_auto("experts", where=_by_itself)
def single(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, **backends: str) -> Tensor:
    return one_token(x, weights, indices, lambda e, rows: swiglu(rows, gate_up[e], down[e], **backends))


def _a_few(x: Tensor, _w: Tensor, indices: Tensor, _gate_up: Tensor, down: Tensor, **_backends: str) -> bool:
    if x.device.type == "cpu" or torch.is_grad_enabled() or indices.numel() > GATHERED:
        return False
    return not grouped_serves(x, down)


@on_auto("experts", where=_a_few)
@implements("experts", "gathered")
def gathered(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    linear_backend: str = "auto",  # noqa: ARG001  batched products have no other library
    elementwise_backend: str = "auto",
) -> Tensor:
    """A few tokens with a copy of every choice's weights: more to read than "grouped", and no wait for the device."""
    chosen, (n, k) = indices.flatten(), indices.shape
    rows = x.repeat_interleave(k, dim=0, output_size=n * k)[..., None].to(product_dtype(x))
    gate, up = (gate_up[chosen].to(rows.dtype) @ rows).chunk(2, dim=1)
    intermediate_size = activate(gate, up, backend=elementwise_backend)
    out = (down[chosen].to(rows.dtype) @ intermediate_size).view(n, k, -1)
    return (at_least_fp32(out) * weights[..., None]).sum(1).to(x.dtype)


def sorted_by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices in the order of their experts, the token of each, and where each expert's run of choices ends.

    Returns: indices into the flattened choices (n·k,), tokens (n·k,), ends (experts,) int32.
    """
    order = indices.flatten().argsort(stable=True)
    # Not bincount, which asks a GPU for the largest index before it counts.
    numbers = torch.arange(experts, device=indices.device)
    ends = torch.searchsorted(indices.flatten()[order], numbers, right=True, out_int32=True)
    return order, order // indices.shape[1], ends


def _odd(_x: Tensor, _w: Tensor, _i: Tensor, _gate_up: Tensor, down: Tensor, **_backends: str) -> bool:
    return backend_of_experts("auto", down) == "loop"


on_auto("experts", where=_odd)(in_turn)


@implements("experts", "grouped")
def grouped(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    linear_backend: str = "auto",
    elementwise_backend: str = "auto",
) -> Tensor:
    """Sort the (token, expert) pairs by expert, so that each expert's rows are neighbours; no wait for the device."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_experts(indices, len(gate_up))
    order, token, ends = sorted_by_expert(indices, len(gate_up))
    gate, up = grouped_linear(x[token], gate_up, ends, backend=linear_backend).chunk(2, dim=-1)
    intermediate_size = activate(gate, up, backend=elementwise_backend)
    out = (
        at_least_fp32(grouped_linear(intermediate_size, down, ends, backend=linear_backend))
        * weights.flatten()[order, None]
    )
    return torch.zeros_like(at_least_fp32(x)).index_add(0, token, out).to(x.dtype)


@implements("experts", "cpp")
def all_in_cpp(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, **backends: str) -> Tensor:
    """As `sorted_in_cpp`, with one kernel for the products of all experts where no backend of `linear` was named."""
    if backends.get("linear_backend", "auto") == "auto":
        backends["linear_backend"] = "cpp"
    return sorted_in_cpp(x, weights, indices, gate_up, down, **backends)


@implements("experts", "sorted")
def sorted_in_cpp(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, **backends: str
) -> Tensor:
    """As `grouped`, sorted and summed in C++, TOKENS at a time."""
    if torch.compiler.is_compiling():  # a traced graph serves any number of tokens
        return _sorted(x, weights, indices, gate_up, down, **backends)
    parts = spans(len(x), TOKENS)
    y = [_sorted(x[a:b], weights[a:b], indices[a:b], gate_up, down, **backends) for a, b in parts]
    return y[0] if len(y) == 1 else torch.cat(y)


def _sorted(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    linear_backend: str = "auto",
    elementwise_backend: str = "auto",
) -> Tensor:
    exact, own = x.dtype == torch.float32, linear_backend == "cpp"
    linear_backend = linear_backend if own else under_autocast(x, linear_backend)
    x = x.to(product_dtype(x))
    token, inverse, ends = ops.permute(indices.contiguous(), gate_up.shape[0])
    alone = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if alone and own and elementwise_backend in ("auto", "cpp") and gate_up.dtype == down.dtype == x.dtype:
        out = ops.feed_forward(x, token, ends, gate_up, down)
    elif alone and not own and choose("linear", linear_backend, x) == "onednn":
        out = x.new_empty(len(token), x.shape[1])
        backends = {"linear_backend": linear_backend, "elementwise_backend": elementwise_backend}
        for e, run in runs(ends):  # an expert at a time, whose rows stay in a core's caches
            more, here = wide(run, len(out))
            out[run] = swiglu(x.index_select(0, token[more]), gate_up[e], down[e], **backends)[here]
    else:
        rows = native.gather(x, token, inverse)
        gate, up = grouped_linear(rows, gate_up, ends, backend=linear_backend).chunk(2, dim=-1)
        intermediate_size = activate(gate, up, backend=elementwise_backend)
        out = grouped_linear(intermediate_size, down, ends, backend=linear_backend)
    return native.combine(out, weights.float().contiguous(), inverse, exact=exact)
