"""Experts in C++: sort tokens by expert, multiply each expert's rows, weight and sum. See ops.py."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layers.cpp.group_ops import groups_of
from layers.cpp.operands import check_memory, operand
from layers.cpp.operators import BF16, FP32, call, names, operator
from layers.cpp.step import mat


@operator("(Tensor out, Tensor weights, Tensor inverse, bool exact) -> Tensor")
def combine(out: Tensor, weights: Tensor, inverse: Tensor, exact: bool) -> Tensor:
    """Σ_j weights[i, j] · out[inverse[i, j]] for each token i, added in fp32 in the order of inverse; fp32 if `exact`.

    weights (n k) are fp32; inverse (n k) name each row of out (n · k, d) once, as those of `permute` do.
    """
    out, weights, inverse = _combine_operands("combine", out, weights, inverse)
    y = out.new_empty(inverse.shape[0], out.shape[1], dtype=FP32 if exact else out.dtype)
    call(f"combine_{names(out, y)}", out, weights, inverse, y, *inverse.shape, out.shape[1])
    return y


@operator("(Tensor out, Tensor weights, Tensor inverse, Tensor to_y) -> Tensor[]")
def combine_backward(out: Tensor, weights: Tensor, inverse: Tensor, to_y: Tensor) -> list[Tensor]:
    """Gradients of `combine`'s out and weights."""
    out, weights, inverse = _combine_operands("combine_backward", out, weights, inverse)
    to_y = operand("combine_backward: to_y", to_y, (inverse.shape[0], out.shape[1]), FP32, out.dtype)
    grads = [torch.empty_like(out), torch.empty_like(weights)]
    call(f"combine_backward_{names(out, to_y)}", out, weights, inverse, to_y, *grads, *inverse.shape, out.shape[1])
    return grads


def _combine_operands(name: str, out: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if out.ndim != 2 or inverse.ndim != 2:
        raise ValueError(
            f"{name}: out must be (n · k, d) and inverse (n, k), got {tuple(out.shape)} and {tuple(inverse.shape)}."
        )
    out = operand(f"{name}: out", out, tuple(out.shape), FP32, BF16)
    weights = operand(f"{name}: weights", weights, tuple(inverse.shape), FP32)
    inverse = operand(f"{name}: inverse", inverse, tuple(inverse.shape), torch.int64)
    if not call("each_once", inverse, inverse.numel(), out.shape[0]):
        raise ValueError(f"{name}: inverse must name each of the {out.shape[0]} rows of out once.")
    return out, weights, inverse


@operator("(Tensor indices, int experts) -> Tensor[]")
def permute(indices: Tensor, experts: int) -> list[Tensor]:
    """Sort the choices (n k) by expert: the token of each place, the place of each choice, where each expert ends.

    Raises: ValueError for an index that names no expert.
    """
    if indices.ndim != 2 or experts < 1 or indices.numel() >= 2**31:
        raise ValueError(f"permute: indices must be (n, k) for at least one expert, they are {tuple(indices.shape)}.")
    indices = operand("permute: indices", indices, tuple(indices.shape), torch.int64)
    token, inverse = indices.new_empty(indices.numel()), torch.empty_like(indices)
    ends = indices.new_empty(experts, dtype=torch.int32)
    if not call("permute", indices, token, inverse, ends, indices.numel(), indices.shape[1], experts):
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"Tokens are routed to the experts {low} to {high}, and there are 0 to {experts - 1}.")
    return [token, inverse, ends]


@operator("(Tensor x, Tensor weight, Tensor ends) -> Tensor")
def products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (rows, k) up to ends[0] times weight[0]ᵀ, up to ends[1] times weight[1]ᵀ, …: (rows, n).

    weight (e, n, k) has x's dtype; sums are fp32. ends (e,) int32 rise to the number of rows.
    """
    x, weight, ends = _product_operands("products", x, weight, ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    call(f"products_{names(x, y)}", x, weight, ends, y, *weight.shape, torch.get_num_threads())
    return y


@operator("(Tensor x, Tensor weight, Tensor ends, Tensor to_y, ScalarType dtype) -> Tensor[]")
def products_backward(x: Tensor, weight: Tensor, ends: Tensor, to_y: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of `products`: x's, and the weight's in `dtype`, which is x's or fp32."""
    x, weight, ends = _product_operands("products_backward", x, weight, ends)
    to_y = operand("products_backward: to_y", to_y, (x.shape[0], weight.shape[1]), x.dtype)
    if dtype not in (x.dtype, FP32):
        raise ValueError(f"products_backward: gradients of the weight must be {x.dtype} or float32, not {dtype}.")
    to_x, to_weight = torch.empty_like(x), torch.empty_like(weight, dtype=dtype)
    threads = torch.get_num_threads()
    call(f"products_to_x_{names(x, x)}", to_y, weight, ends, to_x, *weight.shape, threads)
    call(f"products_to_weight_{names(x, to_weight)}", x, to_y, ends, to_weight, *weight.shape, threads)
    return [to_x, to_weight]


def _product_operands(name: str, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 2 or weight.ndim != 3 or not all(weight.shape):
        raise ValueError(
            f"{name}: x must be (rows, k) and weight (e, n, k), got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    x = operand(f"{name}: x", x, (x.shape[0], weight.shape[2]), FP32, BF16)
    weight = operand(f"{name}: weight", weight, tuple(weight.shape), x.dtype)
    ends = operand(f"{name}: ends", ends, (weight.shape[0],), torch.int32)
    return x, weight, _rising(name, ends, x.shape[0])


def _rising(name: str, ends: Tensor, rows: int) -> Tensor:
    """A copy of where runs end: what was checked is what is read, whatever other threads do."""
    if isinstance(ends, FakeTensor):
        return ends
    check_memory(ends)
    ends = ends.clone()
    runs = [0, *ends.tolist()]
    if runs != sorted(runs) or runs[-1] != rows:
        raise ValueError(f"{name}: ends must rise to {rows}, the number of rows, they are {runs[1:]}.")
    return ends


@operator("(Tensor x, Tensor token, Tensor ends, Tensor gate_up, Tensor down) -> Tensor")
def feed_forward(x: Tensor, token: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each expert's SwiGLU feed-forward of its run of rows x[token], (rows, d); without gradients.

    x (tokens, d); token (rows,) int64 and ends (e,) int32 as `permute` gives them; gate_up (e, 2 · width, d) has gate
    rows above up rows, down is (e, d, width). Rounded as torch rounds the steps: gate, up, silu(gate), their product.
    """
    if down.ndim != 3:
        raise ValueError(f"feed_forward: down must be (e, d, width), it is {tuple(down.shape)}.")
    e, d, width = down.shape
    x = operand("feed_forward: x", x, (x.shape[0] if x.ndim else 0, d), FP32, BF16)
    down = operand("feed_forward: down", down, (e, d, width), x.dtype)
    gate_up = operand("feed_forward: gate_up", gate_up, (e, 2 * width, d), x.dtype)
    return _feed_forward("feed_forward", x, token, ends, (gate_up, None, None), (down, None, None), (e, d, width))


@operator(
    "(Tensor x, Tensor token, Tensor ends, Tensor gate_up, Tensor gate_up_scale, Tensor? gate_up_zero, "
    "Tensor down, Tensor down_scale, Tensor? down_zero) -> Tensor"
)
def feed_forward_in_groups(
    x: Tensor,
    token: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
) -> Tensor:
    """`feed_forward` with weights in groups (layers/quantised/group_weight.py), dequantised in x's dtype."""
    name = "feed_forward_in_groups"
    in_codes, in_scale, in_zero, d = groups_of(f"{name}: gate_up", gate_up, gate_up_scale, gate_up_zero, experts=True)
    out_codes, out_scale, out_zero, width = groups_of(f"{name}: down", down, down_scale, down_zero, experts=True)
    if gate_up.shape[:2] != (len(down), 2 * width) or down.shape[1] != d:
        raise ValueError(
            f"{name}: gate_up must be (e, 2 · width, d) and down (e, d, width), they are "
            f"{(*gate_up.shape[:2], d)} and {(*down.shape[:2], width)}."
        )
    x = operand(f"{name}: x", x, (x.shape[0] if x.ndim else 0, d), FP32, BF16)
    weights = (in_codes, in_scale, in_zero), (out_codes, out_scale, out_zero)
    return _feed_forward(name, x, token, ends, *weights, (len(down), d, width))


def _feed_forward(
    name: str,
    x: Tensor,
    token: Tensor,
    ends: Tensor,
    gate_up: tuple[Tensor, Tensor | None, Tensor | None],
    down: tuple[Tensor, Tensor | None, Tensor | None],
    sizes: tuple[int, int, int],
) -> Tensor:
    """Check token and ends, and call. The weights, as `mat` takes them, are checked already."""
    e, d, width = sizes
    if token.ndim != 1 or not all(sizes):
        raise ValueError(f"{name}: token must be (rows,) and weights not empty, got {tuple(token.shape)} and {sizes}.")
    token = operand(f"{name}: token", token, tuple(token.shape), torch.int64)
    ends = operand(f"{name}: ends", ends, (e,), torch.int32)
    ends = _rising(name, ends, len(token))
    out = x.new_empty(len(token), d)
    if isinstance(token, FakeTensor) or not len(token):
        return out
    check_memory(token)
    token = token.clone()
    if not 0 <= int(token.min()) <= int(token.max()) < len(x):
        raise ValueError(f"{name}: token must hold numbers from 0 to {len(x) - 1}, the rows of x.")
    weights = mat(*gate_up), mat(*down)
    call(f"feed_forward_{names(x, x)}", x, token, ends, *weights, out, e, width, d, torch.get_num_threads())
    return out
