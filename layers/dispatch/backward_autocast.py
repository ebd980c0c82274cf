"""Parts of a model that autocast leaves alone, in the backward pass too.

Where `backward()` is called inside an autocast region, autocast casts the matrix products of gradients as well. A part
that ran with autocast off would then get its gradients in fp16 or bf16. Functions with a backward of their own turn
autocast off in it; what autograd records is marked here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def backward_without_autocast(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> None:
    """Have the gradients from `outputs` down to `inputs` computed with autocast off, wherever backward is called.

    To be called where autocast is on, for what was computed with autocast off; elsewhere nothing happens. Gradients of
    tensors that are not named are marked too, as far down as they were recorded: autocast is not needed in any backward
    pass, because its casts are recorded with their gradients.
    """
    if torch.compiler.is_compiling():  # a traced backward has no autocast
        return
    device = outputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return

    def turn_off(_: object) -> None:
        torch.set_autocast_enabled(device, False)  # autograd restores it after each of its nodes

    known = {x.grad_fn for x in inputs if x is not None and x.grad_fn is not None}
    waiting = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in known or hasattr(node, "variable"):  # a leaf only adds its gradient
            continue
        known.add(node)
        node.register_prehook(turn_off)
        waiting += [before for before, _ in node.next_functions if before is not None]


def without_autocast(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    """`function(*args, **kwargs)` with autocast off, in the backward pass down to `inputs` too."""
    device = next(x.device.type for x in inputs if x is not None)
    with torch.autocast(device, enabled=False):
        outputs = function(*args, **kwargs)
    backward_without_autocast(outputs, inputs)
    return outputs
