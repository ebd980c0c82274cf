"""Record the tensors at hook points, and their gradients on request."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.hook_point import HookPoint
from layers.norm import at_least_fp32
from layers.segments import Segments

PosSlice = int | Sequence[int] | slice | Tensor | None
Metric = Callable[[Tensor], Tensor]


class Acts(dict[str, Tensor]):
    """Tensors by the name of their point; TransformerLens' names work too."""

    def __init__(self, tensors: Mapping[str, Tensor], alias: Mapping[str, str]):
        super().__init__(tensors)
        self.alias = alias

    def __missing__(self, name: str) -> Tensor:
        ours = self.alias.get(name)
        if ours is None or ours not in self:
            raise KeyError(name)
        return self[ours]


class Recording:
    """Records tensors: attach `keep` as the hook. Arguments as in `run_with_cache`."""

    def __init__(self, pos_slice: PosSlice, device: str | torch.device | None, *, with_gradients: bool):
        self.pos_slice, self.device, self.with_gradients = pos_slice, device, with_gradients
        self.passed: dict[str, list[Tensor]] = {}
        self.points: dict[str, HookPoint] = {}
        self.gradients: dict[str, list[Tensor]] = {}

    def keep(self, x: Tensor, hook: HookPoint) -> None:
        self.points[hook.name] = hook
        if not self.with_gradients:  # slice and move at once, to free the rest
            x = self._part(x.detach(), hook.shape)
        self.passed.setdefault(hook.name, []).append(x)

    @staticmethod
    def make_leaf(x: Tensor, _hook: HookPoint) -> Tensor | None:
        """Make the embeddings require gradients, if frozen parameters would otherwise leave none."""
        return None if x.requires_grad else x.detach().requires_grad_()

    def differentiate(self, number: Tensor) -> None:
        """Record the gradients of the scalar `number`: none for integers, zeros if it does not depend on a tensor."""
        wanted = [(name, x) for name, xs in self.passed.items() for x in xs if x.requires_grad]
        found = torch.autograd.grad(number, [x for _, x in wanted], allow_unused=True)
        for (name, x), gradient in zip(wanted, found, strict=True):
            gradient = torch.zeros_like(x) if gradient is None else gradient
            self.gradients.setdefault(name, []).append(gradient)
        for kept in (self.passed, self.gradients):
            for name, xs in kept.items():
                kept[name] = [self._part(x.detach(), self.points[name].shape) for x in xs]

    def result(self, alias: Mapping[str, str]) -> Acts:
        acts = {name: self._joined(name, xs) for name, xs in self.passed.items()}
        grads = {f"{name}_grad": self._joined(name, xs) for name, xs in self.gradients.items()}
        alias = alias | {f"{theirs}_grad": f"{ours}_grad" for theirs, ours in alias.items()}  # type: ignore[operator]
        return Acts(acts | grads, alias)

    def _part(self, x: Tensor, shape: str) -> Tensor:
        dims = shape.split()
        if self.pos_slice is not None and "t" in dims:
            index = [self.pos_slice] if isinstance(self.pos_slice, int) else self.pos_slice
            index = list(index) if isinstance(index, tuple) else index
            x = x[(slice(None),) * dims.index("t") + (index,)].clone()  # a view would keep the whole tensor in memory
        return x if self.device is None else x.to(self.device)

    def _joined(self, name: str, xs: list[Tensor]) -> Tensor:
        if self.points[name].shape == "b h k v":
            return torch.stack(xs, dim=1)
        if self.points[name].shape.startswith("b 1 "):  # fires once per token
            return self._part(torch.cat(xs, dim=1), "b t")
        return xs[-1]


def next_token_loss(
    logits: Tensor, input_ids: Tensor, segments: Segments | None = None, *_rest: object, **_options: object
) -> Tensor:
    """Mean cross-entropy in nats over all tokens that have a next token in their sequence.

    Args:
        logits: (b, t, vocab).
        input_ids, segments: (b, t) ids and segments that forward was called with; its other arguments are ignored.
    Raises: ValueError if logits lack tokens.
    """
    if logits.shape[1] != input_ids.shape[1]:
        raise ValueError("The loss needs the logits of every token: call without logits_to_keep.")
    place = (Segments.full(input_ids) if segments is None else segments).next_is_same()
    return F.cross_entropy(at_least_fp32(logits[place]), input_ids.roll(-1, dims=1)[place])
