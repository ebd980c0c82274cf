"""Round a loaded model's weights block by block, with what each matrix multiplies on given text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layers.linear import Linear
from layers.mlp import activate
from layers.moe import Experts
from layers.quantised.calibrated import output_error, quantise_for
from layers.quantised.experts import QuantisedExperts
from layers.quantised.group_weight import GroupWeight
from layers.quantised.held import GroupLayout
from layers.quantised.linear import QuantisedLinear
from layers.segments import Segments
from qwen3next.checkpoints.group_weights import HEAD, layouts_for, rounded

Grams = dict[str, Tensor]


@dataclass(frozen=True)
class Rounded:
    """What became of one parameter.

    Attributes:
        bits, nbytes: of its codes; with its scales.
        error: ‖rounded − stored‖ / ‖stored‖ of the weights.
        output_error: the same of the outputs on the text; None without text.
        nearest: what output_error would be had every weight been rounded to the nearest code; None without text.
    """

    name: str
    bits: int
    nbytes: int
    error: float
    output_error: float | None = None
    nearest: float | None = None


@torch.no_grad()
def round_model(
    model: Any,
    weights: str,
    *,
    ids: Sequence[Tensor] = (),
    group_size: int | None = None,
    done: Callable[[Rounded], None] = lambda _: None,
) -> list[Rounded]:
    """Round linear maps and experts of a model in place, to "int8" or "int4".

    Each block is rounded with the inputs that the blocks before it give when they are rounded already. Inputs of one
    block are in memory at a time. The MTP layer is rounded to the nearest code. The head stays as it is: other programs
    read folders of one kind of weights.

    Args:
        ids: rows of tokens (1, t) to calibrate with; none rounds to the nearest.
        group_size: inputs that share a scale; None is the usual number, 0 a whole row.
        done: called with the result of each parameter.
    Raises: ValueError for weights that are not finite, and for rows that are no whole groups of `group_size`.
    """
    found, layouts = list[Rounded](), layouts_for(model, weights, group_size)
    layouts.pop(HEAD, None)
    rows = [(model.embed_tokens(row), Segments.full(row)) for row in ids]

    def finish(prefix: str, grams: Grams) -> None:
        for name in [n for n in layouts if n.startswith(prefix)]:
            found.append(_round_one(model, name, layouts.pop(name), grams.get(name)))
            done(found[-1])
        _replace(model, prefix)

    for i, block in enumerate(model.blocks):
        prefix, grams = f"blocks.{i}.", Grams()
        with _watched(block, prefix, layouts.keys(), grams):
            for x, segments in rows:
                _through(model, block, x, segments)
        finish(prefix, grams)
        rows = [(_through(model, block, x, segments), segments) for x, segments in rows]
    finish("", {})
    return found


def _through(model: Any, block: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    y, _ = block(x, model._rotation(segments.positions, x.dtype), segments=segments, stats=False)
    return y


@contextmanager
def _watched(block: nn.Module, prefix: str, wanted: Any, grams: Grams) -> Iterator[None]:
    """Add to `grams`, by parameter, the products x xᵀ of what the block's matrices multiply."""

    def add(name: str, x: Tensor, at: int | None = None, shape: tuple[int, ...] = ()) -> None:
        x = x.flatten(0, -2).float()
        if name not in grams:
            grams[name] = x.new_zeros(*shape, x.shape[-1], x.shape[-1])
        (grams[name] if at is None else grams[name][at]).addmm_(x.mT, x)

    def linear(name: str) -> Callable[..., None]:
        return lambda _module, args: add(name, args[0])

    def experts(name: str) -> Callable[..., None]:
        def hook(module: Experts, args: tuple[Tensor, ...]) -> None:
            x, _, indices = args
            for e in sorted(set(indices.flatten().tolist())):
                own = x[(indices == e).any(-1)]
                gate, up = (own @ module.gate_up_proj[e].mT).chunk(2, dim=-1)
                add(f"{name}.gate_up_proj", own, e, (len(module.gate_up_proj),))
                add(f"{name}.down_proj", activate(gate, up), e, (len(module.down_proj),))

        return hook

    handles = []
    for name, module in block.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, Experts) and f"{name}.down_proj" in wanted:
            handles.append(module.register_forward_pre_hook(experts(name)))
        elif isinstance(module, Linear) and f"{name}.weight" in wanted:
            handles.append(module.register_forward_pre_hook(linear(f"{name}.weight")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round_one(model: nn.Module, name: str, layout: GroupLayout, gram: Tensor | None) -> Rounded:
    """Round one parameter, and keep the result at its module until `_replace`."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    exact = getattr(module, leaf).detach()
    nearest = rounded(exact, layout)
    piece = nearest
    errors: tuple[float | None, float | None] = (None, None)
    if gram is not None:
        piece = quantise_for(exact, gram, layout.bits, layout.group_size, scale_dtype=layout.scale_dtype)
        wrong, whole = output_error(piece, exact, gram)
        plain, _ = output_error(nearest, exact, gram)
        if plain < wrong:  # then the damping decided, as where a matrix saw few inputs
            piece, wrong = nearest, plain
        errors = ((wrong / whole) ** 0.5, (plain / whole) ** 0.5) if whole else (0.0, 0.0)
    module.__dict__.setdefault("_rounded", {})[leaf] = piece
    error = float((piece.dequantise() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30))
    return Rounded(name, piece.bits, piece.nbytes, error, *errors)


def _replace(model: nn.Module, prefix: str) -> None:
    """Put modules with weights in groups in the places of those whose weights were rounded."""
    for name, module in list(model.named_modules()):
        pieces: dict[str, GroupWeight] | None = module.__dict__.pop("_rounded", None)
        if pieces is None or not name.startswith(prefix):
            continue
        if isinstance(module, Experts):
            made: nn.Module = QuantisedExperts(pieces["gate_up_proj"], pieces["down_proj"])
        else:
            made = QuantisedLinear(pieces["weight"], module.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
