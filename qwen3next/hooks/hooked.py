"""Read or replace intermediate tensors by name."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layers.deprecation import warn_renamed
from layers.hook_point import HookPoint
from qwen3next.hooks.materialize import materialize
from qwen3next.hooks.names import Chosen, Filter, aliases, choose
from qwen3next.hooks.recording import Metric, PosSlice, Recording, next_token_loss
from qwen3next.hooks.wrappers import plain_name

Hook = Callable[[Tensor, HookPoint], Tensor | None]
Hooks = Sequence[tuple[Filter, Hook]]


class Hooked(nn.Module):
    """Gives a model its hook points by name, e.g. "blocks.3.linear_attn.hook_beta"."""

    residual: Callable[..., Tensor]
    hook_call: dict[str, Any]  # what the present call tells hooks
    activation_cache: Callable[..., Any]  # what `run_with_cache` returns: q.interp.ActivationCache

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by name, in the order of the modules."""
        return {plain_name(name): module for name, module in self.named_modules() if isinstance(module, HookPoint)}

    def name_hooks(self) -> None:
        """Set the name and layer of every point, and share one dict among them that holds a call's position."""
        for module in self.modules():
            # An instance attribute takes a third of the time of torch's look-up of submodules (docs/hooks.md).
            module.__dict__.update({n: child for n, child in module.named_children() if isinstance(child, HookPoint)})
        for name, point in self.hook_dict.items():
            point.name, point.call, point.ctx = name, self.hook_call, {"layer": _layer(name)}
            point.route = point.route.replace("LAYER", str(_layer(name)))
            if name.startswith("mtp."):  # MTP layers cannot be materialised one by one
                before = f" after {point.route.split(' or ')[0]}" if point.route else ""
                point.route = f"model.loss(input_ids){before}"

    def match_hooks(self, names: Filter) -> list[str]:
        """Names of the points that match a glob, a list of globs or a predicate; TransformerLens' names work too.

        Raises: ValueError if nothing matches.
        """
        chosen = {name for choice in self._choose(names) for name in choice.names}
        return [name for name in self.hook_dict if name in chosen]

    def _choose(self, names: Filter) -> list[Chosen]:
        known = list(self.hook_dict)
        return choose(names, known, aliases(known))

    def materialize(
        self, *, state: Mapping[int, Sequence[int]] | None = None, pattern: Sequence[int] = ()
    ) -> ExitStack:
        """Materialize tensors that are computed only on request. Replaces the previous choice; no arguments clear it.

        Args:
            state: absolute positions by Gated DeltaNet layer; `linear_attn.hook_state` fires with the recurrent state
                (b h k v) after each, and `hook.ctx["position"]` gives the position. A patch acts on all later tokens.
            pattern: layers whose `hook_pattern` fires. A Gated DeltaNet layer then computes its output as A v, where
                editing A[t, s] changes only what t reads from s; a softmax layer runs "eager".
        Returns: a context manager that restores the previous choice at the end of a `with` block.
        Raises: ValueError for a layer that does not exist or has no state, and for negative positions.
        """
        return materialize(list(self.get_submodule("blocks").children()), state, pattern)

    def expose(self, **choice: Any) -> ExitStack:
        """The old name of `materialize`."""
        warn_renamed("model.expose", "materialize")
        return self.materialize(**choice)

    def add_hook(self, names: Filter, fn: Hook, dir: str = "fwd", is_permanent: bool = False) -> None:
        """Attach `fn` until `reset_hooks`; a permanent one stays until `reset_hooks(including_permanent=True)`.

        Firing is not checked, except that a forward which skips the point's tensor raises RuntimeError.
        Raises: ValueError for a name that matches nothing.
        """
        points = self.hook_dict
        for choice in self._choose(names):
            for name in choice.names:
                _attach(points[name], fn, dir, set(), optional=not choice.each, permanent=is_permanent)

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Detach the hooks that `add_hook`, `hooks` and `run_with_hooks` attached, and reset every `hook.ctx`.

        Hooks registered with torch's own methods stay; remove them by their handles.
        """
        gone = (False, True) if including_permanent else (False,)
        for name, point in self.hook_dict.items():
            point.remove(lambda hook: getattr(hook, "permanent", None) in gone)
            point.ctx = {"layer": _layer(name)}

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        *,
        must_fire: bool = True,
        reset_hooks_end: bool = True,
    ) -> Iterator[None]:
        """Attach `fn(tensor, hook)` during a `with` block; a returned tensor replaces the hooked one.

        Args:
            bwd_hooks: `fn(grad, hook)` gets the gradient of the point's tensor, in backward passes through calls made
                inside the block; a returned tensor replaces the gradient.
            must_fire: whether it is an error if a point does not fire.
            reset_hooks_end: False leaves the hooks attached until `reset_hooks`.
        Raises: ValueError, at the start, for a name that matches nothing. RuntimeError if a named point does not fire
            or gets no gradient, or if that holds for all points of a glob that ends in a wildcard.
        """
        points, awaited = self.hook_dict, []
        with ExitStack() as stack:
            for direction, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for names, fn in pairs:
                    for choice in self._choose(names):
                        heard: set[str] = set()
                        awaited.append((choice, heard))
                        for name in choice.names:
                            optional = not (must_fire and choice.each and name in choice.awaited)
                            stack.callback(_attach(points[name], fn, direction, heard, optional=optional))
            if not reset_hooks_end:
                stack.pop_all()
            yield
        silent = sorted(set().union(*(choice.silent(heard) for choice, heard in awaited))) if must_fire else []
        if silent:
            told = [f"{name} did not fire: {points[name].remedy}" for name in silent[:3]]
            more = [f"and {len(silent) - 3} more did not fire"] if len(silent) > 3 else []
            raise RuntimeError("; ".join(told + more) + ". Their tensors were not read or changed.")

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run forward with hooks attached during the call; other arguments are those of forward.

        Backward hooks act in every backward pass through this call, including later ones. With `stop_at_layer`, returns
        the residual stream (b t width) before that block instead, see `residual`.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end=reset_hooks_end):
            return self._called(*args, stop_at_layer=stop_at_layer, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Filter | None = "*",
        pos_slice: PosSlice = None,
        stop_at_layer: int | None = None,
        device: str | torch.device | None = None,
        incl_bwd: bool | Metric = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Run forward and return logits and the chosen tensors by name as an ActivationCache.

        Other arguments are those of forward. A point that fires once per token gives one tensor (b t …); states at
        several positions are stacked, (b positions h k v).

        Args:
            names_filter: as in `match_hooks`. A glob that ends in a wildcard leaves out points that do not fire.
            pos_slice: tokens of this call to keep: an index, indices, or a slice.
            stop_at_layer: return the residual stream (b t width) before this block instead of logits; negative counts
                from the end.
            device: device for the kept tensors; None leaves them where they are.
            incl_bwd: also keep gradients, as NAME_grad: of the mean next-token loss (True), or of a function from
                logits to a scalar. Parameters get no gradients.
        Raises: as `hooks`; ValueError for segments with gaps, or `incl_bwd=True` with `stop_at_layer`.
        """
        if incl_bwd is True and stop_at_layer is not None:
            raise ValueError("stop_at_layer gives no logits: set incl_bwd to a function of the residual stream.")
        given = inspect.signature(self.forward).bind_partial(*args, **kwargs).arguments
        cache, segments = given.get("cache"), given.get("segments")
        if segments is not None and segments.gapped:
            raise ValueError(
                "A row has gaps between its tokens, so kept tensors would not align with the columns of input_ids: "
                "give the ids and segments that segments.closed(ids) returns."
            )
        continued = cache is not None and any(cache.lengths)
        recording = Recording(pos_slice, device, with_gradients=bool(incl_bwd))
        keep: Hooks = [("*" if names_filter is None else names_filter, recording.keep)]
        leaf: Hooks = [("hook_embed", recording.make_leaf)] if incl_bwd else []
        with torch.set_grad_enabled(torch.is_grad_enabled() or bool(incl_bwd)):
            with self.hooks([*leaf, *keep]):
                output = self._called(*args, stop_at_layer=stop_at_layer, **kwargs)
            output = output if isinstance(output, Tensor) else output.logits
            if incl_bwd:
                number = incl_bwd(output) if callable(incl_bwd) else next_token_loss(output, *args, **kwargs)
                recording.differentiate(number)
        kept = recording.result(aliases(self.hook_dict))
        whole = pos_slice is None
        acts = self.activation_cache(kept, self, segments=given.get("segments") if whole else None)
        acts.from_start, acts.gapless = whole and not continued, whole
        return output.detach() if incl_bwd else output, acts

    def _called(self, *args: Any, stop_at_layer: int | None, **kwargs: Any) -> Any:
        return self(*args, **kwargs) if stop_at_layer is None else self.residual(stop_at_layer, *args, **kwargs)


def _layer(name: str) -> int | None:
    """The number of the block in a point's name."""
    match = re.search(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def _attach(
    point: HookPoint, fn: Hook, direction: str, heard: set[str], *, optional: bool, permanent: bool = False
) -> Callable[[], None]:
    """Register `fn` and add the point's name to `heard` when it fires; returns a function that removes it."""

    def forward(module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        assert isinstance(module, HookPoint)
        heard.add(module.name)
        return fn(output, module)

    def passed(module: nn.Module, _args: Any, output: Tensor) -> None:
        assert isinstance(module, HookPoint)
        if output.requires_grad:
            heard.add(module.name)
        elif not optional:
            raise RuntimeError(
                f"{module.name} gets no gradient: run without torch.no_grad(), and use forward hooks for integers."
            )

    def backward(module: nn.Module, gradients: Any) -> tuple[Tensor] | None:
        assert isinstance(module, HookPoint)
        replaced = fn(gradients[0], module)
        return None if replaced is None else (replaced,)

    for hook in (forward, passed, backward):
        hook.__dict__.update(may_stay_silent=optional, permanent=permanent)
    if direction == "fwd":
        return point.register_forward_hook(forward).remove
    if direction != "bwd":
        raise ValueError(f'A hook runs in direction "fwd" or "bwd", not {direction!r}.')
    noting, acting = point.register_forward_hook(passed), point.register_full_backward_pre_hook(backward)

    def remove() -> None:
        noting.remove()
        acting.remove()

    return remove
