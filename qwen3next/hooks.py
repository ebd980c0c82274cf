"""Read or replace inner tensors by name."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from layers.hook_point import HookPoint

Filter = str | Sequence[str] | Callable[[str], bool]
Hook = Callable[[Tensor, HookPoint], Tensor | None]


class Hooked(nn.Module):
    """Gives a model its hook points by name, e.g. "blocks.3.linear_attn.hook_beta"."""

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by name, in the order of the modules."""
        return {name: module for name, module in self.named_modules() if isinstance(module, HookPoint)}

    def match_hooks(self, names: Filter) -> list[str]:
        """Names that a glob, a list of globs or a predicate chooses. Raises: ValueError where none is chosen."""
        known = self.hook_dict
        if callable(names):
            chosen = [name for name in known if names(name)]
            unmatched = ["the predicate"] if not chosen else []
        else:
            found = {p: set(fnmatch.filter(known, p)) for p in ([names] if isinstance(names, str) else names)}
            matched = set().union(*found.values())
            chosen = [name for name in known if name in matched]
            unmatched = [p for p, matches in found.items() if not matches]
        if unmatched:
            raise ValueError(f"No hook point matches {', '.join(unmatched)}: model.hook_dict lists them all.")
        return chosen

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[Filter, Hook]], *, must_fire: bool = True) -> Iterator[None]:
        """Attach `fn(tensor, hook)` for the time of the block; what it returns, if anything, replaces the tensor.

        Raises: ValueError for a name that matches nothing, at once; RuntimeError at the end for a point that never
            fired (unless not `must_fire`), as with scores and pattern where attention does not run "eager".
        """
        silent: set[str] = set()
        points = self.hook_dict
        with ExitStack() as stack:
            for names, fn in fwd_hooks:
                # A forward does not run the MTP head: only who asks for it by name expects its points to fire.
                named = [names] if isinstance(names, str) else [] if callable(names) else names
                mtp_meant = any(name.startswith("mtp.") for name in named)
                for name in self.match_hooks(names):
                    if mtp_meant or not name.startswith("mtp."):
                        silent.add(name)

                    def call(
                        module: nn.Module, _args: Any, output: Tensor, name: str = name, fn: Hook = fn
                    ) -> Tensor | None:
                        silent.discard(name)
                        assert isinstance(module, HookPoint)
                        return fn(output, module)

                    stack.enter_context(points[name].register_forward_hook(call))
            yield
        if silent and must_fire:
            raise RuntimeError(
                f"{', '.join(sorted(silent))} did not fire, so nothing was read or changed there. Scores and pattern "
                'exist only with attention backend "eager" (model.set_backend("attention", "eager")); points below mtp '
                "only in model.loss."
            )

    def run_with_hooks(self, *args: Any, fwd_hooks: Sequence[tuple[Filter, Hook]], **kwargs: Any) -> Any:
        """A forward with hooks attached for its time. Arguments other than `fwd_hooks` are forward's."""
        with self.hooks(fwd_hooks):
            return self(*args, **kwargs)

    def run_with_cache(self, *args: Any, names_filter: Filter = "*", **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the chosen inner tensors by name. With the default filter, silent points are left out."""
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: HookPoint) -> None:
            kept[hook.name] = x.detach()

        with self.hooks([(names_filter, keep)], must_fire=names_filter != "*"):
            output = self(*args, **kwargs)
        return output.logits, kept
