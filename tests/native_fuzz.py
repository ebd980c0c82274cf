"""Call every compiled function with valid, unusual and wrong arguments: it returns or raises, without invalid access.

    python tests/native_fuzz.py CALLS [SEED]

`make test-sanitize` runs a million calls with kernels compiled with AddressSanitizer and UBSan.
"""

import sys
import time
import warnings

import torch
from torch import Tensor, nn

import qwen3next as q
from layers.cpp import build, ops
from layers.cpp.group_ops import dequantise_groups
from layers.cpp.group_ops import group_linear as group_linear_op
from layers.cpp.signatures import ARGUMENTS
from layers.state.update_log import UpdateLog, _replay_compiled, fold
from qwen3next.checkpoints.calibration import round_model
from qwen3next.decoding.mtp_plan import why_not_draft
from qwen3next.decoding.plan import MOST_TOKENS

REFUSED = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, AttributeError)
FP32, BF16 = torch.float32, torch.bfloat16


class Sub(Tensor):
    """A tensor subclass without changes."""


class Random:
    """Sizes, tensors and choices from one seed."""

    def __init__(self, seed: int):
        self.made = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        return int(torch.randint(0, n, (), generator=self.made))

    def pick(self, things):
        things = list(things)
        return things[self.below(len(things))]

    def size(self, *, least: int = 1) -> int:
        return least + self.pick((0, 1, 2, 3, 7, 15, 16, 17))

    def tokens(self) -> int:
        return self.pick((0, 1, 2, 5, 63, 64, 65, 130))

    def normal(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(shape, generator=self.made).to(dtype)


def rule(r: Random) -> dict:
    b, t, kh, share = r.size(least=0) % 3, r.tokens(), 1 + r.below(2), 1 + r.below(3)
    k, v, h, dtype = r.size(), r.size(), kh * share, r.pick((FP32, BF16))
    starts = r.pick((None, torch.rand(b, t, generator=r.made) < 0.1))
    return {
        "q": r.normal(b, t, kh, k), "k": r.normal(b, t, kh, k), "v": r.normal(b, t, h, v, dtype=dtype),
        "log_decay": -r.normal(b, t, h).abs(), "beta": r.normal(b, t, h).sigmoid(), "starts": starts,
        "state": r.normal(b, h, k, v), "keep": bool(r.below(2)),
    }  # fmt: skip


def rule_backward(r: Random) -> dict:
    x = rule(r) | {"keep": True}
    out, after, kept = ops.delta_rule(*x.values())
    del x["state"], x["keep"]
    return x | {"kept": kept, "to_out": torch.ones_like(out), "to_after": torch.ones_like(after)}


def attend(r: Random) -> dict:
    b, kvh, share, d, dtype = 1 + r.below(2), 1 + r.below(2), 1 + r.below(3), r.size(), r.pick((FP32, BF16))
    s = 1 + r.tokens()
    t = 1 + r.below(s)
    k, v = (r.normal(b, kvh, s, d, dtype=dtype) for _ in "kv")
    return {"q": r.normal(b, kvh * share, t, d, dtype=dtype), "k": k, "v": v, "causal": bool(r.below(2))}


def normalise(r: Random) -> dict:
    shape, dtype = (*(r.size(least=0) for _ in range(r.below(4))), r.size()), r.pick((FP32, BF16))
    return {
        "x": r.normal(*shape, dtype=dtype), "weight": r.normal(shape[-1]),
        "gate": r.pick((None, r.normal(*shape, dtype=dtype))), "mean": bool(r.below(2)), "eps": 1e-6,
        "before": bool(r.below(2)), "after": bool(r.below(2)), "exact": bool(r.below(2)),
    }  # fmt: skip


def normalise_backward(r: Random) -> dict:
    x = normalise(r)
    to_y = r.normal(*x["x"].shape, dtype=r.pick((FP32, x["x"].dtype)))
    return {name: x[name] for name in ("x", "weight", "gate")} | {"to_y": to_y, "mean": x["mean"], "eps": 1e-6}


def convolve(r: Random) -> dict:
    b, t, d, taps, dtype = r.below(3), r.tokens(), r.size(), r.pick((1, 2, 4, 8, 9, 33)), r.pick((FP32, BF16))
    return {
        "x": r.normal(b, t, d, dtype=dtype),
        "weight": r.normal(taps, d),
        "state": r.normal(b, taps - 1, d, dtype=dtype),
    }


def convolve_backward(r: Random) -> dict:
    x = convolve(r)
    return x | {"to_y": torch.ones_like(x["x"])}


def swiglu(r: Random) -> dict:
    n, d, dtype = r.size(least=0), r.size(), r.pick((FP32, BF16))
    both = r.normal(n, 2 * d, dtype=dtype)
    return {"gate": both[:, :d], "up": r.pick((both[:, d:], both[:, d:].contiguous()))}


def swiglu_backward(r: Random) -> dict:
    x = swiglu(r)
    return x | {"to_y": torch.ones_like(x["gate"]).contiguous()}


def combine(r: Random) -> dict:
    n, k, d = r.size(least=0), 1 + r.below(4), r.size()
    inverse = torch.randperm(n * k, generator=r.made).view(n, k)
    out = r.normal(n * k, d, dtype=r.pick((FP32, BF16)))
    return {"out": out, "weights": r.normal(n, k), "inverse": inverse, "exact": bool(r.below(2))}


def combine_backward(r: Random) -> dict:
    x = combine(r)
    del x["exact"]
    return x | {"to_y": r.normal(len(x["inverse"]), x["out"].shape[1], dtype=r.pick((FP32, x["out"].dtype)))}


def products(r: Random) -> dict:
    e, n, k, dtype = 1 + r.below(3), r.size(), r.size(), r.pick((FP32, BF16))
    rows = [r.below(20) for _ in range(e)]
    ends = torch.tensor(rows).cumsum(0).int()
    return {"x": r.normal(sum(rows), k, dtype=dtype), "weight": r.normal(e, n, k, dtype=dtype), "ends": ends}


def products_backward(r: Random) -> dict:
    x = products(r)
    to_y = r.normal(len(x["x"]), x["weight"].shape[1], dtype=x["x"].dtype)
    return x | {"to_y": to_y, "dtype": r.pick((FP32, x["x"].dtype))}


def feed_forward(r: Random) -> dict:
    e, width, d, dtype, n = 1 + r.below(3), r.size(), r.size(), r.pick((FP32, BF16)), 1 + r.below(9)
    rows = [r.below(20) for _ in range(e)]
    return {
        "x": r.normal(n, d, dtype=dtype), "token": torch.randint(0, n, (sum(rows),), generator=r.made),
        "ends": torch.tensor(rows).cumsum(0).int(), "gate_up": r.normal(e, 2 * width, d, dtype=dtype),
        "down": r.normal(e, d, width, dtype=dtype),
    }  # fmt: skip


def feed_forward_in_groups(r: Random) -> dict:
    made = feed_forward(r)
    e, double, d = made.pop("gate_up").shape
    shapes = {"gate_up": (e, double, d), "down": (e, d, double // 2)}
    del made["down"]
    for name, shape in shapes.items():
        columns = shape[-1]
        bits = r.pick((4, 8)) if columns % 2 == 0 else 8
        count = r.pick([n for n in (1, 2, 3, 8) if columns % n == 0])
        kind, held = (torch.int8, columns) if bits == 8 else (torch.uint8, columns // 2)
        codes = torch.randint(-128, 128, (*shape[:-1], held), generator=r.made).to(torch.int8).view(kind)
        zero = torch.randint(-128, 128, (*shape[:-1], count), generator=r.made).to(torch.int8)
        scale = r.normal(*shape[:-1], count, dtype=r.pick((FP32, BF16, torch.float16)))
        made |= {name: codes, f"{name}_scale": scale, f"{name}_zero": r.pick((None, zero))}
    return made


def permute(r: Random) -> dict:
    n, k, experts = r.size(least=0), 1 + r.below(4), 1 + r.below(9)
    return {"indices": torch.randint(0, experts, (n, k), generator=r.made), "experts": experts}


def groups(r: Random) -> dict:
    """The parts of a weight in groups."""
    out, bits, group = r.size(), r.pick((4, 8)), r.pick((8, 16, 32, 64, 128))
    count = 1 + r.below(5)
    columns = r.pick((2 * r.size(), group)) if count == 1 else count * group
    dtype, shape = r.pick((FP32, BF16, torch.float16)), (out, count if columns == count * group else 1)
    kind, most = (torch.int8, columns) if bits == 8 else (torch.uint8, columns // 2)
    codes = torch.randint(-128, 128, (out, most), generator=r.made).to(torch.int8).view(kind)
    zero = torch.randint(-128, 128, shape, generator=r.made).to(torch.int8)
    return {"codes": codes, "scale": r.normal(*shape, dtype=dtype), "zero": r.pick((None, zero))}


def group_linear(r: Random) -> dict:
    parts = groups(r)
    columns = parts["codes"].shape[1] * (2 if parts["codes"].dtype == torch.uint8 else 1)
    return {"x": r.normal(r.size(least=0), columns, dtype=r.pick((FP32, BF16)))} | parts


def replay(r: Random) -> dict:
    b, n, kh, share, k, v = 1 + r.below(2), r.below(5), 1 + r.below(2), 1 + r.below(2), r.size(), r.size()
    dtype, h = r.pick((FP32, torch.float64)), kh * share
    return {
        "state": r.normal(b, h, k, v, dtype=dtype), "keys": r.normal(b, n, kh, k, dtype=dtype),
        "writes": r.normal(b, n, h, v, dtype=dtype), "decay": r.normal(b, n, h, dtype=dtype),
    }  # fmt: skip


def fold_one(conv: Tensor, state: Tensor, inputs: Tensor, keys: Tensor, writes: Tensor, decay: Tensor, counts) -> list:
    """`fold` of one layer whose last call brought these."""
    log = UpdateLog(conv, state, state.dtype, [keys], [writes], [decay], [inputs], [True], [0])
    return fold([(conv, state)], [log], counts)


def folded(r: Random) -> dict:
    b, n, kh, share, kernel = 1 + r.below(2), 1 + r.below(4), 1 + r.below(2), 1 + r.below(3), 1 + r.below(4)
    k, v, h, dtype = r.size(), r.size(), kh * share, r.pick((FP32, BF16))
    channels = 2 * kh * k + h * v
    return {
        "conv": r.normal(b, kernel, channels, dtype=dtype), "state": r.normal(b, h, k, v, dtype=r.pick((FP32, BF16))),
        "inputs": r.normal(b, n, channels, dtype=dtype), "keys": r.normal(b, n, kh, k),
        "writes": r.normal(b, n, h, v), "decay": r.normal(b, n, h).abs(),
        "counts": [r.below(n + 1) for _ in range(b)],
    }  # fmt: skip


# The entries, how their valid arguments are made, and the compiled functions that they call.
ENTRIES = {
    "delta_rule": (ops.delta_rule, rule),
    "delta_rule_backward": (ops.delta_rule_backward, rule_backward),
    "attend": (ops.attend, attend),
    "normalise": (ops.normalise, normalise),
    "normalise_backward": (ops.normalise_backward, normalise_backward),
    "convolve": (ops.convolve, convolve),
    "convolve_backward": (ops.convolve_backward, convolve_backward),
    "silu": (ops.silu_fp32, lambda r: {"x": r.normal(r.size(least=0), r.size(), dtype=r.pick((FP32, BF16)))}),
    "swiglu": (ops.swiglu, swiglu),
    "swiglu_backward": (ops.swiglu_backward, swiglu_backward),
    "combine": (ops.combine, combine),
    "combine_backward": (ops.combine_backward, combine_backward),
    "permute": (ops.permute, permute),
    "feed_forward": (ops.feed_forward, feed_forward),
    "feed_forward_in_groups": (ops.feed_forward_in_groups, feed_forward_in_groups),
    "products": (ops.products, products),
    "products_backward": (ops.products_backward, products_backward),
    "replay": (_replay_compiled, replay),
    "fold": (fold_one, folded),
    "group_linear": (group_linear_op, group_linear),
    "dequantise": (dequantise_groups, lambda r: groups(r) | {"dtype": r.pick((FP32, BF16))}),
}
THROUGH_OTHERS = {
    "each_once",
    "structure_size",
    "decode_step",
    "linear",
    "remember_pairs",
    "draft",
    *(name for name in ARGUMENTS if name.startswith("products_to_")),
}  # combine; nothing; steps of a model; products_backward


def odd(r: Random, x: Tensor) -> Tensor:
    """The same numbers in another memory layout or tensor class: the result must not change."""
    way = r.below(6)
    if way == 0 and x.ndim > 1:
        return x.mT.contiguous().mT
    if way == 1:
        return torch.stack((x, x), dim=-1)[..., 0]
    if way == 2 and x.is_floating_point() and not x.requires_grad:
        return torch._neg_view(-x)
    if way == 3:
        return torch.cat((x.new_zeros(5), x.flatten()))[5:].view(x.shape)
    if way == 4:
        return x.as_subclass(Sub)
    return x.flip(0).flip(0) if x.ndim else x


def wrong(r: Random, x: object) -> object:
    """An argument different from x."""
    if not isinstance(x, Tensor):
        return r.pick((None, -1, 2**40, 0.5, "x", True, torch.zeros(1)))
    if x.layout is torch.strided and x.device.type == "cpu":
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
        if x.untyped_storage().nbytes() < (x.storage_offset() + last + 1) * x.itemsize:
            return x  # an earlier call took its memory, and torch's own operations would read past it
    way = r.below(13)
    if way == 0:
        return x.to(
            r.pick((torch.float64, torch.float16, torch.int64, torch.int32, torch.bool, FP32, BF16, torch.int8))
        )
    if way == 1:
        return x.unsqueeze(r.below(x.ndim + 1))
    if way == 2:
        return x.flatten()
    if way == 3 and x.ndim:
        return x.narrow(r.below(x.ndim), 0, 0)
    if way == 4 and x.ndim:
        axis = r.below(x.ndim)
        return torch.cat((x, x), dim=axis)
    if way == 5 and x.ndim:
        axis = r.below(x.ndim)
        return x.narrow(axis, 0, max(x.shape[axis] - 1, 0))
    if way == 6:
        return x.to("meta")
    if way in (7, 8):
        x = x.clone()
        x.untyped_storage().resize_(0 if way == 7 else x.untyped_storage().nbytes() // 2)
        return x
    if way == 9:
        return r.pick((None, 3, [1.0]))
    if way == 10 and x.dtype == torch.int64:
        return x + r.pick((-1, 1, 1000, 2**40, -(2**62)))
    if way == 11 and x.is_floating_point():
        return x * r.pick((float("nan"), float("inf"), 1e38, 0.0))
    if way == 12 and x.is_floating_point():
        return x.to_sparse() if r.below(2) else torch.complex(x.float(), x.float())
    return x.movedim(0, -1) if x.ndim else x


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return isinstance(a, (list, tuple)) and all(same(x, y) for x, y in zip(a, b, strict=True))


def call(r: Random, name: str) -> str:
    """Call an entry once; returns the kind of result."""
    run, make = ENTRIES[name]
    arguments = make(r)
    kind = r.pick(("right", "odd", "wrong", "wrong"))
    with torch.set_grad_enabled(bool(r.below(2))):
        if kind == "right":
            run(*arguments.values())
            return kind
        if kind == "odd":
            expected = run(*arguments.values())
            other = {n: odd(r, x) if isinstance(x, Tensor) else x for n, x in arguments.items()}
            got = run(*other.values())
            assert same(expected, got), f"{name} gives another result for the same numbers in another memory layout"
            return kind
        chosen = r.pick(arguments)
        arguments[chosen] = wrong(r, arguments[chosen])
        try:
            run(*arguments.values())
        except REFUSED:
            return "refused"
        return "taken"


def walk_steps(r: Random, steps: int) -> None:
    """Steps of models with replaced weights, caches and ids, some of which are invalid."""
    model = q.Qwen3Next(
        q.presets.tiny(
            hidden_size=16, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"), head_dim=8,
            vocab_size=11, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=5, linear_key_head_dim=3,
            shared_expert_intermediate_size=5, linear_value_head_dim=4, mtp_num_hidden_layers=1,
        )
    )  # fmt: skip
    if r.below(2):
        round_model(model, r.pick(("int8", "int4")), group_size=r.pick((0, 8)))
    model.set_backend("decode", "cpp")  # raises where compiled code cannot run
    options = r.pick(({}, {"kv_dtype": "int8"}, {"kv_dtype": "bfloat16"}, {"history": 2}, {"state_dtype": "bfloat16"}))
    cache = model.new_cache(1 + r.below(2), max_len=600, mtp=bool(r.below(2)), **options)
    ids = torch.zeros(cache.batch, 1 + r.below(3), dtype=torch.long)
    for _ in range(steps):
        way = r.below(8)
        try:
            if way == 0:
                weight = r.pick(model.parameters())
                weight.data = wrong(r, weight.data)
            elif way == 1:
                owner, name = r.pick(
                    (m, n) for m in model.modules() for n in m._parameters if m._parameters[n] is not None
                )
                setattr(owner, name, nn.Parameter(wrong(r, getattr(owner, name).detach()), requires_grad=False))
            elif way == 5 and any(True for _ in model.buffers()):
                owner, name = r.pick([(m, n) for m in model.modules() for n in m._buffers])
                if r.below(2):
                    owner._buffers[name].data = wrong(r, owner._buffers[name].data)
                else:
                    owner._buffers[name] = r.pick((wrong, odd))(r, owner._buffers[name])
            elif way == 2:
                state = r.pick(cache.layers)
                if hasattr(state, "recurrent"):
                    name = r.pick(("conv", "recurrent"))
                    setattr(state, name, r.pick((odd, wrong))(r, getattr(state, name)))
            elif way == 3:
                ids = wrong(r, ids)
                if isinstance(ids, Tensor) and ids.untyped_storage().nbytes() < ids.nbytes:
                    return  # torch reads the ids first, and would read outside of them
                if isinstance(ids, Tensor) and ids.numel() > MOST_TOKENS:
                    return  # then the modules run, and torch reads the weights unchecked
            elif way == 4:
                cache = cache.fork()[0] if r.below(2) else cache.select([0])
            if cache.unwritten_mtp is not None and why_not_draft(model):
                return  # then the MTP layer's modules run, and torch reads their weights unchecked
            model.step(ids, cache)
            model.logits_after(cache)
            if cache.unwritten_mtp is not None:
                model.draft_tokens(cache, ids[:, 0], 1 + r.below(3))
            with cache.revocable(ids.shape[1]):
                logits = model.step_all(ids, cache)
                cache.take_back([r.below(ids.shape[1] + 1)] * cache.batch, logits=logits[:, 0])
            cache.write_pairs()
            if cache.batch == 1:
                rows, caches = [ids[0], ids[0][:1]], [cache, cache.fork()[0]]
                model.step_many(rows, caches, all_logits=bool(r.below(2)))
        except REFUSED:
            return
    return


def main(calls: int, seed: int = 0) -> None:
    """Raises: AssertionError for a result that depends on the memory layout."""
    assert build.missing() is None, build.missing()
    covered = {name for name in ARGUMENTS if name.removesuffix("_fp32").removesuffix("_bf16") in ENTRIES}
    assert set(ARGUMENTS) - covered == THROUGH_OTHERS, set(ARGUMENTS) - covered
    warnings.simplefilter("ignore")
    r, begun, counts, done, shown = Random(seed), time.monotonic(), {}, 0, 0.0
    while done < calls:
        if r.below(50) == 0:
            walk_steps(r, 20)
            done, what = done + 20, "steps"
        else:
            what = call(r, r.pick(ENTRIES))
            done += 1
        counts[what] = counts.get(what, 0) + 1
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{done:,} calls, {shown - begun:.0f} s: {counts}", flush=True)
    print(f"{done:,} calls, {time.monotonic() - begun:.0f} s: {counts}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
