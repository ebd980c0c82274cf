"""Measure what docs/numerics.md reports. Prints its tables as Markdown; takes minutes on two cores.

    python docs/measure_numerics.py

Needs transformers. All models have random weights. fp64 is this implementation in float64.
Both fp32 models are compared with it, so that neither is favoured.
"""

import platform
import tempfile
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn

import qwen3next as q
from layers.delta_rule import gated_delta_rule
from layers.norm import l2_normalise
from layers.rope import rotation
from layers.segments import Segments
from qwen3next.checkpoints.state_dict_adapter import to_released

LENGTHS = (1, 63, 64, 65, 300)
SEEDS = (0, 1)


def config(std: float, **changes: object) -> q.ModelConfig:
    """Eight layers, 6 Gated DeltaNet and 2 softmax; wide enough for every head to be shared."""
    return q.presets.tiny(num_hidden_layers=8, initializer_range=std, **changes)


def random_model(std: float, seed: int, **changes: object) -> q.Qwen3Next:
    torch.manual_seed(seed)
    return q.Qwen3Next(config(std, **changes)).eval()


def triple(model: q.Qwen3Next) -> tuple[q.Qwen3Next, nn.Module, q.Qwen3Next]:
    """The same weights here, in transformers, and here in float64."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.lm_head.weight.dtype)
        return q.load(folder).eval(), theirs.eval(), q.load(folder).eval().double()


def tokens(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{c:.1e}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


@torch.no_grad()
def forward_fp32() -> None:
    """Largest absolute differences of logits over seeds and lengths."""
    head("init std", "feed-forward", "ours − theirs", "ours − fp64", "theirs − fp64", "ours, recurrent − fp64")
    for std in (0.02, 0.1, 0.2):
        for kind, changes in (("MoE", {}), ("dense", {"num_experts": 0})):
            worst = [0.0] * 4
            for seed in SEEDS:
                ours, theirs, exact = triple(random_model(std, seed, **changes))
                for length in LENGTHS:
                    ids = tokens(length, seed)
                    a, b, c = ours(ids).logits, theirs(ids).logits, exact(ids).logits
                    ours.set_backend("delta_rule", "recurrent")
                    d = ours(ids).logits
                    ours.set_backend("delta_rule", "auto")
                    worst = [max(x) for x in zip(worst, map(largest, (a, a, b, d), (b, c, c, c)), strict=True)]
            row(std, kind, *worst)


def gradients_fp32() -> None:
    """Worst tensor of all released ones, MTP left out: ‖g − g′‖ / ‖g′‖ of the cross-entropy's gradient."""
    head(
        "length",
        "ours − transformers",
        "ours − fp64",
        "transformers − fp64",
        "worst tensor, ours − transformers",
    )
    ours, theirs, exact = triple(random_model(0.02, 0))
    for length in (16, 65, 300):
        ids = tokens(length)
        grads = []
        for model in (ours, theirs, exact):
            model.zero_grad()
            logits = model(ids).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            grads.append(dict(released_gradients(model)))
        # Gradients that are zero but for rounding, as of an unchosen expert, have nothing to compare.
        least = 1e-6 * max(g.norm() for g in grads[2].values())
        names = [n for n, g in grads[2].items() if g.norm() > least]
        pairs = [{n: relative(grads[i][n], grads[j][n]) for n in names} for i, j in ((0, 1), (0, 2), (1, 2))]
        row(length, *(max(p.values()) for p in pairs), f"`{max(pairs[0], key=pairs[0].__getitem__)}`")


def released_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients under released names; transformers stacks experts, which are cut as we cut them."""
    if isinstance(model, q.Qwen3Next):
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        yield from ((n, g) for n, g in to_released(model.config, grads) if not n.startswith("mtp."))
        return
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if name.endswith("experts.gate_up_proj"):
            for e, g in enumerate(grad):
                gate, up = g.chunk(2)
                yield name.replace("gate_up_proj", f"{e}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{e}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for e, g in enumerate(grad):
                yield name.replace("down_proj", f"{e}.down_proj.weight"), g
        else:
            yield name, grad


@torch.no_grad()
def forward_bf16() -> None:
    """Weights rounded to bf16 and stored so; fp64 uses the same ones. 300 tokens, means over seeds.

    Relative rms error of logits; share of tokens with the most likely next token of fp64; share of (token,
    layer) pairs with the experts of fp64.
    """
    head("init std", "feed-forward", "ours", "theirs", "ours, top token", "theirs, top token", "ours, experts")
    for std in (0.02, 0.1):
        for kind, changes in (("MoE", {}), ("dense", {"num_experts": 0})):
            sums = torch.zeros(5)
            for seed in SEEDS:
                ours, theirs, exact = triple(random_model(std, seed, **changes).bfloat16())
                ids = tokens(300, seed)
                a, b, c = ours(ids).logits, theirs(ids).logits, exact(ids).logits
                same = [(x.argmax(-1) == c.argmax(-1)).float().mean().item() for x in (a, b)]
                experts = same_experts(ours, exact, ids) if kind == "MoE" else 1.0
                sums += torch.tensor([relative(a, c), relative(b, c), *same, experts])
            mean = (sums / len(SEEDS)).tolist()
            shares = [f"{x:.1%}" for x in mean[2:]]
            row(std, kind, *mean[:2], *shares[:2], shares[2] if kind == "MoE" else "–")


def same_experts(a: q.Qwen3Next, b: q.Qwen3Next, ids: Tensor) -> float:
    """Share of (token, layer) pairs for which both models choose the same set of experts."""
    chosen = [m.run_with_cache(ids, names_filter="blocks.*.hook_router_indices")[1] for m in (a, b)]
    equal = [(chosen[0][n].sort(-1).values == chosen[1][n].sort(-1).values).all(-1) for n in chosen[0]]
    return torch.stack(equal).float().mean().item()


@torch.no_grad()
def same_tokens_another_way() -> None:
    """Largest logit difference between two ways to run the same tokens, fp32, init std 0.02."""
    head("way", "compared with", "largest logit difference", "in float64")
    columns = []
    for double in (False, True):
        model = random_model(0.02, 0)
        columns.append(_ways(model.double() if double else model))
    for (way, other, single), (_, _, double_) in zip(*columns, strict=True):
        row(way, other, single, double_)


def _ways(model: q.Qwen3Next) -> list[tuple[str, str, float]]:
    ids = tokens(300)
    whole = model(ids).logits
    lengths = (1, 63, 64, 65, 107)
    packed = model(ids, segments=Segments.from_lengths([lengths])).logits
    separate = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    found = [("packed, 5 sequences", "one at a time", largest(packed, separate))]
    mask = torch.ones(1, 337).long()
    mask[:, :37] = 0
    padded = model(nn.functional.pad(ids, (37, 0)), segments=Segments.from_mask(mask)).logits[:, 37:]
    found.append(("37 paddings on the left", "none", largest(padded, whole)))
    for size in (64, 100):
        cache = model.new_cache(max_len=300)
        parts = [model(part, cache=cache).logits for part in ids.split(size, dim=1)]
        found.append((f"prefill in chunks of {size}", "one shot", largest(torch.cat(parts, dim=1), whole)))
    cache = model.new_cache(max_len=300)
    steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(300)]
    found.append(("cached, token by token", "one shot", largest(torch.cat(steps, dim=1), whole)))
    for operation, name in (("delta_rule", "recurrent"), ("attention", "eager"), ("experts", "loop")):
        model.set_backend(operation, name)
        found.append((f"{operation}: {name}", "auto", largest(model(ids).logits, whole)))
        model.set_backend(operation, "auto")
    return found


def chunked_rule() -> None:
    """The operation alone against its token loop in fp64: relative error of output, state, worst gradient.

    2 key heads, 4 value heads, widths 64 and 48, 300 tokens after a state of std 1.
    """
    head("dtype", "log decay", "backend", "output", "state", "worst gradient")
    for dtype, backends in ((torch.float32, ("chunked", "recurrent")), (torch.float64, ("chunked",))):
        for name, scale in (("mean −0.05", 0.05), ("mean −5", 5.0)):
            exact, exact_state, *exact_grads = _rule("recurrent", torch.float64, scale)
            for backend in backends:
                o, state, *grads = _rule(backend, dtype, scale)
                worst = max(map(relative, grads, exact_grads))
                kind = str(dtype).removeprefix("torch.")
                row(kind, name, backend, relative(o, exact), relative(state, exact_state), worst)


def _rule(backend: str, dtype: torch.dtype, scale: float) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    b, t, kh, h, k, v = 2, 300, 2, 4, 64, 48
    inputs = [
        leaf(l2_normalise(normal(b, t, kh, k)) * k**-0.5),
        leaf(l2_normalise(normal(b, t, kh, k))),
        leaf(normal(b, t, h, v)),
        leaf(-normal(b, t, h).exp() / 1.65 * scale),  # log-normal; its mean is e^½ = 1.65
        leaf(normal(b, t, h).sigmoid()),
        leaf(normal(b, h, k, v)),
    ]
    o, state = gated_delta_rule(*inputs[:5], state=inputs[5], backend=backend)
    loss = (o * normal(b, t, h, v)).sum() + (state * normal(b, h, k, v)).sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


@torch.no_grad()
def strong_forgetting() -> None:
    """fp32 logits where some tokens forget strongly: in_proj_a times a factor; 300 tokens, init std 0.02, dense.

    Largest absolute differences over seeds, after the least log decay of the model.
    """
    head("in_proj_a", "least log decay", "ours − theirs", "ours − fp64", "theirs − fp64", "ours, recurrent − fp64")
    for factor in (1.0, 1e3, 1e5, 1e7):
        worst, least = [0.0] * 4, 0.0
        for seed in SEEDS:
            model = random_model(0.02, seed, num_experts=0)
            for name, p in model.named_parameters():
                if name.endswith("in_proj_a.weight"):
                    p.mul_(factor)
            ours, theirs, exact = triple(model)
            ids = tokens(300, seed)
            _, acts = exact.run_with_cache(ids, names_filter="blocks.*.hook_log_decay")
            least = min(least, *(acts[n].min().item() for n in acts))
            a, b, c = ours(ids).logits, theirs(ids).logits, exact(ids).logits
            ours.set_backend("delta_rule", "recurrent")
            worst = [max(x) for x in zip(worst, map(largest, (a, a, b, ours(ids).logits), (b, c, c, c)), strict=True)]
        row(f"{factor:.0e}", least, *worst)


@torch.no_grad()
def one_strong_token() -> None:
    """The operation alone in fp32, the 4th of 128 tokens with a strong log decay: largest error against fp64's loop.

    Outputs are of order 1; the other log decays lie between 0 and −0.05.
    """
    theirs = transformers.models.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule
    backends = ("chunked", "chunked_recompute", "cpp", "recurrent")
    head("log decay", *backends, "transformers, chunked")
    for strong in (-1e2, -1e4, -1e6, -torch.inf):
        rng = torch.Generator().manual_seed(0)
        q_, k = (l2_normalise(torch.randn(1, 128, 4, 16, generator=rng)) for _ in range(2))
        v, beta = torch.randn(1, 128, 4, 16, generator=rng), torch.rand(1, 128, 4, generator=rng)
        g = -torch.rand(1, 128, 4, generator=rng) * 0.05
        g[:, 3] = strong
        exact, _ = gated_delta_rule(*(x.double() for x in (q_ / 4, k, v, g, beta)), backend="recurrent")
        found = [largest(gated_delta_rule(q_ / 4, k, v, g, beta, backend=b)[0], exact) for b in backends]
        row(strong, *found, largest(theirs(q_, k, v, g, beta)[0], exact))


def positions() -> None:
    """cos and sin of RoPE (64 dimensions, theta 1e7) in fp32 against fp64: largest absolute errors."""
    head("position", "ours", "theirs")
    config = transformers.Qwen3NextConfig(head_dim=256, partial_rotary_factor=0.25, rope_theta=1e7)
    theirs = transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextRotaryEmbedding(config)
    for position in (300, 32_767, 262_143, 1_000_000, 2**24 + 1):
        at = torch.tensor([[position]])
        ours, exact = (rotation(at, rotary_dim=64, theta=1e7, dtype=d) for d in (torch.float32, torch.float64))
        found = [x[:, :, None] for x in theirs(torch.zeros(1, 1, 1), at)]
        row(position, *(max(map(largest, x, exact)) for x in (ours, found)))


@torch.no_grad()
def caches() -> None:
    """What coarser caches cost: a prompt in chunks of 64, then 200 tokens one by one, beside an fp32 cache."""
    head("keys and values", "state", "std 0.02", "top token", "std 0.1", "top token")
    kinds = [("bfloat16", "float32"), ("float16", "float32"), ("int8", "float32"), ("float32", "bfloat16")]
    for kv, state in (*kinds, ("int8", "bfloat16")):
        cells: list[object] = []
        for std in (0.02, 0.1):
            errors, same = [], []
            for seed in SEEDS:
                model, ids = random_model(std, seed, num_experts=0), tokens(1224, seed)
                runs = []
                for kinds_of in ({"kv_dtype": kv, "state_dtype": state}, {}):
                    cache = model.new_cache(max_len=ids.shape[1], **kinds_of)
                    for _ in model.prefill(ids[:, :1024], cache, chunk_size=64):
                        pass
                    steps = ids[:, 1024:].split(1, dim=1)
                    runs.append(torch.cat([model(x, cache=cache).logits for x in steps], dim=1))
                errors.append(relative(*runs))
                same.append((runs[0].argmax(-1) == runs[1].argmax(-1)).double().mean().item())
            cells += [sum(errors) / len(SEEDS), f"{100 * sum(same) / len(SEEDS):.1f}%"]
        row(kv, state, *cells)


def main() -> None:
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    )
    sections: tuple[Callable[[], None], ...] = (
        forward_fp32,
        gradients_fp32,
        forward_bf16,
        same_tokens_another_way,
        chunked_rule,
        one_strong_token,
        strong_forgetting,
        positions,
        caches,
    )
    for section in sections:
        print(f"\n{section.__doc__}")
        section()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
