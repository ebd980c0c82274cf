"""Regions of the model whose weights a process holds in part: messages at their borders, whole weights inside.

x enters a region by `copied` and its result leaves by `summed` (the f and g of arXiv:1909.08053): each process
computes with its own heads or rows, and the sum over processes is the result. A weight that every head uses, such as
the norms of q and k, enters by `copied` too: each process has the gradient of its own heads, and without their sum no
error shows, but training drifts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Group = dist.ProcessGroup | None


def copied(x: Tensor, group: Group) -> Tensor:
    """x on every process of the group; its gradient is the sum of theirs. None: a region of one process."""
    return x if group is None else _Copied.apply(x, group)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group; every process has its gradient already."""
    return x if group is None else _Summed.apply(x, group)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduced(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def all_reduced(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: the sum (or `op`) of x over the group."""
    x = x.clone(memory_format=torch.contiguous_format)
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x


class Substitution(NamedTuple):
    """During a call, `make()` stands for the parameter `leaf` of a module."""

    module: nn.Module
    leaf: str
    make: Callable[[], Tensor]


@contextmanager
def substituted(items: Sequence[Substitution]) -> Iterator[None]:
    """Put tensors in the place of parameters. Gradients flow through them to the parameters that they are made of."""
    made = [item.make() for item in items]  # before any is replaced
    before = [item.module._parameters[item.leaf] for item in items]
    for item, tensor in zip(items, made, strict=True):
        item.module._parameters[item.leaf] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for item, parameter in zip(items, before, strict=True):
            item.module._parameters[item.leaf] = parameter


def parameter(module: nn.Module, leaf: str) -> Tensor:
    """A parameter as it is now: FSDP exchanges it between its shard and the gathered one."""
    found = module._parameters[leaf]
    assert found is not None
    return found


def local(module: nn.Module, leaf: str) -> Tensor:
    """This process's part of a parameter; its gradient is that part's."""
    found = parameter(module, leaf)
    return found.to_local(grad_placements=found.placements) if isinstance(found, DTensor) else found


def part(module: nn.Module, leaf: str) -> Substitution:
    """This process's part stands for the parameter."""
    return Substitution(module, leaf, lambda: local(module, leaf))


def shared(module: nn.Module, leaf: str, group: Group) -> Substitution:
    """A parameter that all heads use: its gradient is the sum over the group."""
    return Substitution(module, leaf, lambda: copied(parameter(module, leaf), group))


def region(
    call: Callable[..., Tensor], items: Sequence[Substitution], group: Group, *, inputs: int = 1
) -> Callable[..., Tensor]:
    """`call` as a region; its first `inputs` arguments are those that gradients flow to."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with substituted(items):
            given = [copied(x, group) if i < inputs else x for i, x in enumerate(args)]
            return summed(call(*given, **kwargs), group)

    return run
