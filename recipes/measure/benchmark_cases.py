"""The cases of `recipes.benchmark`: the same work in qwen3next and in others, and the amount of that work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qwen3next as q
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import choose_for
from layers.moe import SparseMoE
from layers.norm import l2_normalise
from recipes.measure.work import active_weight_bytes, delta_rule_flops, forward_flops, train_flops

Run = Callable[[], object]


@dataclass
class Case:
    """One comparison.

    Attributes:
        what: name of the row.
        runs: which implementations of ours run in it.
        tokens: tokens in one run.
        flops: floating-point operations of the required matrix products.
        nbytes: bytes of weights and states that must be read.
        sides: the functions to time, by name; "qwen3next" first.
    """

    what: str
    tokens: int
    flops: int = 0
    nbytes: int = 0
    sides: dict[str, Run] = field(default_factory=dict)
    runs: str = ""


class Job(NamedTuple):
    """A case that is not made yet: its name, and what makes it."""

    what: str
    make: Callable[[], Case]


def implementations(model: q.Qwen3Next, *operations: str, gradients: bool = False, dtype: str | None = None) -> str:
    """What runs of ours for these operations, for a row of the table.

    Args:
        dtype: of the products under autocast; None means the model's own, without autocast.
    """
    kind = model.dtype if dtype is None else getattr(torch, dtype)
    found = {"linear": "torch"} if dtype is not None else {}  # autocast multiplies in torch
    with torch.set_grad_enabled(gradients):
        for operation in operations:
            found.setdefault(operation, choose_for(operation, "auto", model.device, kind))
    return ", ".join(f"{operation} {found[operation]}" for operation in operations)


LAYERS = ("linear", "elementwise", "delta_rule", "causal_conv", "attention", "experts")


@dataclass(frozen=True)
class Models:
    """The same weights in both implementations."""

    ours: q.Qwen3Next
    theirs: torch.nn.Module
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        return self.ours.embed_tokens.weight.device

    def draw(self, b: int, t: int) -> Tensor:
        """Random tokens."""
        return torch.randint(self.ours.vocab_size, (b, t), generator=self.generator).to(self.device)


def prefill(models: Models, batch: int, length: int) -> Case:
    """Prefill of a prompt, with logits of its last token."""
    ours, theirs, ids = models.ours, models.theirs, models.draw(batch, length)

    @torch.no_grad()
    def us() -> None:
        ours(ids, cache=ours.new_cache(batch, max_len=length), logits_to_keep=1)

    @torch.no_grad()
    def them() -> None:
        theirs(ids, use_cache=True, logits_to_keep=1)

    flops = batch * forward_flops(ours.config, length)
    sides: dict[str, Run] = {"qwen3next": us, "transformers": them}
    return Case(f"prefill {batch} x {length}", ids.numel(), flops, 0, sides, implementations(ours, *LAYERS))


def decode(models: Models, batch: int, before: int, steps: int, *, at_once: int = 1) -> Case:
    """Steps of `at_once` tokens a row after a context. Each repetition adds the same tokens to both contexts."""
    ours, theirs = models.ours, models.theirs
    ids, new = models.draw(batch, before), models.draw(batch, steps * at_once)
    with torch.no_grad():
        cache = ours.new_cache(batch, max_len=before + 100 * steps * at_once)
        ours(ids, cache=cache, logits_to_keep=1)
        past = theirs(ids, use_cache=True, logits_to_keep=1).past_key_values

    def us() -> None:
        for tokens in new.split(at_once, dim=1):
            ours.step(tokens, cache)

    @torch.no_grad()
    def them() -> None:
        for tokens in new.split(at_once, dim=1):
            theirs(tokens, past_key_values=past, use_cache=True)

    weight = ours.embed_tokens.weight
    nbytes = steps * active_weight_bytes(ours.config, weight.element_size(), tokens=batch * at_once)
    what = f"decode {batch} x {at_once} after {before}"
    sides: dict[str, Run] = {"qwen3next": us, "transformers": them}
    return Case(what, new.numel(), 0, nbytes, sides, implementations(ours, "decode"))


def question(models: Models, document: int, tokens: int) -> Case:
    """Another question about a document that is already in the prefix store."""
    ours, theirs = models.ours, models.theirs
    text, asked = models.draw(1, document), models.draw(1, tokens)
    whole = torch.cat((text, asked), dim=1)
    store = q.PrefixStore(ours, budget="8GiB")
    list(store.prefill(text))
    drawn = torch.Generator().manual_seed(0)

    def us() -> None:  # a new question each time: a repeated one would be answered from the store
        new = torch.randint(ours.vocab_size, (1, tokens), generator=drawn).to(models.device)
        list(store.prefill(torch.cat((text, new), dim=1)))

    @torch.no_grad()
    def them() -> None:
        theirs(whole, use_cache=True, logits_to_keep=1)

    flops = forward_flops(ours.config, tokens, past=document)
    what = f"question of {tokens} after {document}"
    sides: dict[str, Run] = {"qwen3next": us, "transformers, cold": them}
    return Case(what, tokens, flops, 0, sides, implementations(ours, *LAYERS))


def train(models: Models, batch: int, length: int, *, autocast: bool) -> Case:
    """Loss and gradients, without an optimizer; bf16 is autocast over fp32 weights."""
    ours, theirs, ids = models.ours, models.theirs, models.draw(batch, length)
    mixed: dict[str, Any] = {"device_type": models.device.type, "dtype": torch.bfloat16, "enabled": autocast}

    def us() -> None:
        ours.zero_grad()
        with torch.autocast(**mixed):
            loss = ours.loss(ids).lm
        loss.backward()

    def them() -> None:
        theirs.zero_grad()
        with torch.autocast(**mixed):
            loss = theirs(ids, labels=ids).loss
        loss.backward()

    flops = batch * train_flops(ours.config, length)
    runs = implementations(ours, *LAYERS, gradients=True, dtype="bfloat16" if autocast else None)
    sides: dict[str, Run] = {"qwen3next": us, "transformers": them}
    return Case(f"train {batch} x {length}", ids.numel(), flops, 0, sides, runs)


def experts(models: Models, tokens: int) -> Case:
    """The mixture of experts of one layer."""
    ours, theirs = models.ours.blocks[0].mlp, models.theirs.get_submodule("model.layers.0.mlp")
    assert isinstance(ours, SparseMoE)
    c, weight = models.ours.config, models.ours.embed_tokens.weight
    x = torch.randn(1, tokens, c.hidden_size, generator=models.generator).to(weight)

    @torch.no_grad()
    def us() -> None:
        ours(x, stats=False)

    @torch.no_grad()
    def them() -> None:
        theirs(x)

    inner = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
    flops = 2 * tokens * c.hidden_size * (3 * inner + c.num_experts + 1)
    runs = implementations(models.ours, "linear", "elementwise", "experts")
    return Case(f"experts alone, {tokens}", tokens, flops, 0, {"qwen3next": us, "transformers": them}, runs)


def delta_rule(models: Models, tokens: int, *, heads: tuple[int, int], dim: int, backward: bool) -> Case:
    """The delta rule alone, on random inputs with normalised q and k."""
    (key_heads, value_heads), like = heads, models.ours.embed_tokens.weight
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator).to(like).requires_grad_(backward)

    q_, k, v = random(key_heads, dim), random(key_heads, dim), random(value_heads, dim)
    gate = (-random(value_heads).float().abs() * 0.1).detach().requires_grad_(backward)
    beta = random(value_heads).float().sigmoid().detach().requires_grad_(backward)

    def us() -> None:
        with torch.set_grad_enabled(backward):
            o, _ = gated_delta_rule(l2_normalise(q_.float()) * dim**-0.5, l2_normalise(k.float()), v, gate, beta)
            if backward:
                o.float().sum().backward()

    def them() -> None:
        with torch.set_grad_enabled(backward):
            wide = (x.repeat_interleave(value_heads // key_heads, dim=2) for x in (q_, k))
            o, _ = torch_chunk_gated_delta_rule(*wide, v, gate, beta, use_qk_l2norm_in_kernel=True)
            if backward:
                o.float().sum().backward()

    flops = delta_rule_flops(tokens=tokens, heads=value_heads, key_dim=dim, value_dim=dim) * (3 if backward else 1)
    what = f"delta rule {'and gradients ' if backward else ''}{key_heads}:{value_heads} x {dim}, {tokens}"
    runs = implementations(models.ours, "elementwise", "delta_rule", gradients=backward)
    return Case(what, tokens, flops, 0, {"qwen3next": us, "transformers": them}, runs)
