"""The kernels of a decoding step, run by Triton's interpreter, against their definitions in torch.

In bf16 the interpreter, as interpreted.py mends it, casts as a GPU does: where a kernel rounds as its definition does,
both give the same bits but for sums that end next to the middle between two numbers.
"""

import pytest
import torch

pytest.importorskip("triton")

import interpreted  # noqa: F401  # mends bf16
import triton
import triton.language as tl

from layers.dispatch import registry
from layers.dispatch.registry import case_of, function_of, parts_of
from layers.dispatch.self_check import checked

pytestmark = pytest.mark.oracle

CPU = torch.device("cpu")
PARTS = parts_of("one_token", "triton")
DTYPES = (torch.float32, torch.bfloat16)
# Relative, in the norm. A rounding that a kernel leaves out is 2e-3 or more; attention rounds elsewhere, see there.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-4}
OTHERWISE = {"attend": 5e-3}


def random(*shape, dtype=torch.float32, seed=0):
    """Numbers that bf16 holds, so that both dtypes begin alike."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def apart(found, expected):
    """The largest relative error, in the norm, of corresponding tensors; infinite where one is not a number."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        errors.append(((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-20)).item())
    return max(e if e == e else float("inf") for e in errors)


def both(part, call):
    """What `call(run)` gives by the kernel and by the definition."""
    with torch.no_grad():
        return apart(*(call(function_of(f"one_token.{part}", name)) for name in ("triton", "torch")))


def test_every_part_has_a_kernel_a_definition_and_a_case():
    assert set(PARTS) == set(parts_of("one_token", "torch"))
    assert len(PARTS) == 7
    assert all(case_of(f"one_token.{part}", "triton") for part in PARTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_the_case_of_the_self_check(part, dtype):
    case = case_of(f"one_token.{part}", "triton")
    with torch.no_grad():
        error = apart(case("triton", CPU, dtype, 0), case("torch", CPU, dtype, 0))
    assert error < (OTHERWISE.get(part, 0.0) if dtype == torch.bfloat16 else 0.0) + BOUND[dtype]
    assert checked(f"one_token.{part}", "triton", CPU, dtype, 0, False) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_centred", [True, False])
@pytest.mark.parametrize("rows, width, weight_dtype", [(1, 1, None), (16, 52, None), (2, 2048, None), (2, 50, "other")])
def test_add_rms_norm(rows, width, weight_dtype, zero_centred, dtype):
    x, y = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    w = random(width, dtype=torch.float32 if weight_dtype else dtype, seed=2)
    for other in (y, None):

        def call(run, other=other):
            return run(x, other, w, eps=1e-6, zero_centred=zero_centred)

        assert both("add_rms_norm", call) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, kh, h, d, dv, taps", [(1, 1, 1, 5, 9, 4), (2, 4, 4, 16, 16, 2), (1, 2, 4, 128, 128, 4)])
def test_convolve(rows, kh, h, d, dv, taps, dtype):
    """Both sides of the state; what the step may not write stays."""
    channels = 2 * kh * d + h * dv
    for side in (0, 1):

        def call(run, side=side):
            state = random(2, rows, taps - 1, channels, dtype=dtype)
            x, w = random(rows, channels, dtype=dtype, seed=1), random(channels, taps, dtype=dtype, seed=2)
            sizes = {"key_heads": kh, "value_heads": h, "key_dim": d}
            found = run(x, w, state, torch.tensor([side]), **sizes)
            assert torch.equal(state[side], random(2, rows, taps - 1, channels, dtype=dtype)[side])
            return *found, state

        assert both("convolve", call) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, kh, h, d, dv", [(1, 1, 1, 5, 9), (3, 4, 4, 16, 24), (1, 2, 4, 128, 128)])
def test_delta_rule(rows, kh, h, d, dv, state_dtype, dtype):
    """With gates from near 0 to near 1, and a decay beyond softplus's threshold; norm weights of either dtype."""
    for weight_dtype in DTYPES:

        def call(run, weight_dtype=weight_dtype):
            q, k = (torch.nn.functional.normalize(random(rows, kh, d, seed=s), dim=-1) for s in (1, 2))
            v, z = random(rows, h, dv, dtype=dtype, seed=3), random(rows, h * dv, dtype=dtype, seed=4)
            b, a = (4 * random(rows, h, dtype=dtype, seed=5), 15 * random(rows, h, dtype=dtype, seed=6).abs())
            a_log, bias = -4 + random(h, seed=7), random(h, dtype=dtype, seed=8)
            w, state = random(dv, dtype=weight_dtype, seed=9), random(2, rows, h, d, dv, dtype=state_dtype)
            return run(q, k, v, b, a, z, a_log, bias, w, state, torch.tensor([1]), eps=1e-6), state

        bound = BOUND[torch.bfloat16 if torch.bfloat16 in (dtype, state_dtype) else dtype]
        assert both("delta_rule", call) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    "rows, h, kvh, d, rotary, kv_dtype",
    [(1, 16, 2, 256, 64, None), (3, 4, 4, 20, 10, None), (2, 4, 1, 32, 32, None), (2, 2, 1, 32, 8, torch.float32)],
)
def test_rotate_and_store(rows, h, kvh, d, rotary, kv_dtype, norms, dtype):
    """Places that are not the token's keep what they hold."""
    place = torch.tensor([7, 0, 3][:rows])

    def call(run):
        q, k, v = (random(rows, n, d, dtype=dtype, seed=i) for i, n in enumerate((h, kvh, kvh)))
        weights = [random(d, dtype=dtype, seed=3 + i) if norms else None for i in range(2)]
        cos, sin = (random(8, rotary, dtype=dtype, seed=5 + i) for i in range(2))
        buffers = [random(rows, kvh, 8, d, dtype=kv_dtype or dtype, seed=7 + i) for i in range(2)]
        found = run(q, k, v, *weights, cos, sin, *buffers, place, eps=1e-6, zero_centred=not rows % 2)
        return found, *buffers

    assert both("rotate_and_store", call) < BOUND[dtype]


def attention_errors(call, dtype):
    """Of kernel and definition in `dtype`, to the definition in fp64 from the same numbers. In bf16 the definition
    rounds scores and shares where no fused attention does, so that two right answers are a few roundings apart."""
    run = {name: function_of("one_token.attend", name) for name in ("triton", "torch")}
    (truth,) = call(run["torch"], torch.float64)
    return [apart([call(run[name], dtype)[0].double()], [truth]) for name in ("triton", "torch")]


BLOCK = {torch.float32: 16, torch.bfloat16: 32}  # places that a program of attention takes at once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks, over", [(0, 1), (1, -1), (1, 0), (1, 1), (64, 0), (64, 1), (130, -3)])
def test_attention_at_the_ends_of_blocks_and_splits(blocks, over, dtype):
    """What lies behind the token is not read: it is NaN here."""
    length = blocks * BLOCK[dtype] + over

    def call(run, dtype):
        q, gate = random(1, 4, 32, dtype=dtype), random(1, 128, dtype=dtype, seed=1)
        keys, values = (random(1, 2, length + 40, 32, dtype=dtype, seed=2 + i) for i in range(2))
        if run is not function_of("one_token.attend", "torch"):  # which multiplies what it then masks
            keys[:, :, length:], values[:, :, length:] = torch.nan, torch.nan
        return (run(q, keys, values, torch.tensor([length - 1]), gate),)

    kernel, definition = attention_errors(call, dtype)
    assert kernel < (min(6e-3, 1.1 * definition) if dtype == torch.bfloat16 else BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "h, kvh, d, gate_rows, kv_dtype",
    [(16, 2, 256, 256, None), (4, 4, 20, 1, None), (34, 1, 32, 0, None), (2, 1, 32, 32, torch.float32)],
)
def test_attention_of_every_form(h, kvh, d, gate_rows, kv_dtype, dtype):
    """Gates of every kind, shares of heads below and above a tile, rows of unequal lengths."""
    rows, n = 2, 80

    def call(run, dtype):
        q = random(rows, h, d, dtype=dtype)
        keys, values = (random(rows, kvh, n, d, dtype=kv_dtype or dtype, seed=2 + i) for i in range(2))
        gate = random(rows, h * gate_rows, dtype=dtype, seed=1) if gate_rows else None
        return (run(q, keys, values, torch.tensor([70, 3]), gate),)

    kernel, definition = attention_errors(call, dtype)
    assert kernel < (min(6e-3, 1.1 * definition) if dtype == torch.bfloat16 else BOUND[dtype])


def test_attention_in_a_larger_buffer_gives_the_same_bits():
    q, keys, values = (
        random(1, n, s, 32, dtype=torch.bfloat16, seed=i) for i, (n, s) in enumerate(((4, 1), (2, 200), (2, 200)))
    )
    place, attend = torch.tensor([99]), function_of("one_token.attend", "triton")
    small = attend(q[:, :, 0].contiguous(), keys[:, :, :100].contiguous(), values[:, :, :100].contiguous(), place, None)
    assert torch.equal(attend(q[:, :, 0].contiguous(), keys, values, place, None), small)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("experts, top_k", [(512, 10), (8, 8), (5, 1), (60, 16)])
def test_route(experts, top_k, renormalise, dtype):
    """Ties, two zeros, infinities: numbers and their order are equal, not only the weights."""
    logits = random(6, experts, dtype=dtype)
    logits[1] = logits[1].round()
    logits[2] = 0.25
    logits[3] = torch.tensor([0.0, -0.0, 1.0]).repeat(experts)[:experts]
    logits[4, ::2] = -torch.inf
    logits[5] -= 3e4
    x, w = random(6, 100, dtype=dtype, seed=1), random(1, 100, dtype=dtype, seed=2)
    options = {"top_k": top_k, "norm_topk_prob": renormalise}
    found, expected = (function_of("one_token.route", n)(logits, x, w, **options) for n in ("triton", "torch"))
    assert torch.equal(found[1], expected[1])
    assert apart(found, expected) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, width, count, top_k, inner, own", [(1, 52, 8, 3, 19, 7), (16, 64, 4, 2, 32, 48), (1, 600, 12, 10, 136, 130)]
)
def test_experts(rows, width, count, top_k, inner, own, dtype):
    """Fewer units in the shared expert than in the others, and more; sizes beyond one block."""

    def call(run):
        x, weights = random(rows, width, dtype=dtype), random(rows, top_k, dtype=dtype, seed=1).abs()
        numbers = torch.stack([random(count, seed=i).argsort()[:top_k] for i in range(rows)]).to(torch.int32)
        gates = random(rows, 1, dtype=dtype, seed=2)
        shapes = (count, 2 * inner, width), (count, width, inner), (own, width), (own, width), (width, own)
        gate_up, down, *shared = (0.1 * random(*s, dtype=dtype, seed=3 + i) for i, s in enumerate(shapes))
        return (run(x, weights, numbers, gates, gate_up, down, tuple(shared)),)

    assert both("experts", call) < BOUND[dtype]


@pytest.mark.parametrize("part", ["add_rms_norm", "rotate_and_store", "attend", "route", "experts"])
def test_a_row_alone_gives_the_bits_that_it_gives_in_a_batch(part):
    """The case's rows, of which the kernel sees all or the last one; weights are the tensors of other lengths."""
    rows = 3
    real, seen = function_of(f"one_token.{part}", "triton"), []

    def call(*tensors, **options):
        def last(x):
            if isinstance(x, torch.Tensor) and len(x) == rows:
                return x[-1:].clone()
            return x

        alone = real(*map(last, tensors), **options)
        together = real(*tensors, **options)
        seen.extend(zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (alone, together)), strict=True))
        return together

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(registry._functions, (f"one_token.{part}", "triton"), call)
        case_of(f"one_token.{part}", "triton")("triton", CPU, torch.bfloat16)
    assert seen
    for alone, together in seen:
        assert torch.equal(alone, together[-1:])


@triton.jit
def _not_rounded(x, dtype: tl.constexpr):
    return x


def _reversed_ties(logits, *tensors, **options):
    weights, numbers, gates = _ROUTE(logits.flip(-1), *tensors, **options)
    return weights, logits.shape[1] - 1 - numbers, gates


def _one_place_less(q, keys, values, position, gate):
    return _ATTEND(q, keys, values, position - 1, gate)


def _one_place_more(q, keys, values, position, gate):
    return _ATTEND(q, keys, values, position + 1, gate)


_ROUTE, _ATTEND = (function_of(f"one_token.{part}", "triton") for part in ("route", "attend"))


@pytest.mark.parametrize(
    "part, wrong", [("route", _reversed_ties), ("attend", _one_place_less), ("attend", _one_place_more)]
)
def test_a_wrong_kernel_is_found(part, wrong, monkeypatch):
    """By these tests and, on a GPU, by the self-check."""
    monkeypatch.setitem(registry._functions, (f"one_token.{part}", "triton"), wrong)
    monkeypatch.setattr("layers.dispatch.self_check._results", {})
    with pytest.raises(AssertionError):
        test_the_case_of_the_self_check(part, torch.float32)
    assert "is off by" in checked(f"one_token.{part}", "triton", CPU, torch.float32, 0, False)


@pytest.mark.parametrize("module, part", [("deltanet", "convolve"), ("deltanet", "delta_rule"), ("experts", "experts")])
def test_a_rounding_that_is_left_out_is_found(module, part, monkeypatch):
    monkeypatch.setattr(f"layers.triton.{module}.rounded", _not_rounded)
    with pytest.raises(AssertionError):
        test_the_case_of_the_self_check(part, torch.bfloat16)
