"""NaN, infinity and very large numbers at absent tokens, in another packed sequence, or in another row.

Values at padding and in other rows do not change a bit of a row's values and gradients. A packed sequence with such
numbers does not change the others: compared with separate runs, they are bit-equal in an operation, and equal to
rounding in a model, whose products run over all tokens together.
"""

import math
from functools import cache

import pytest
import torch

import qwen3next as q
from layers.causal_conv import causal_conv
from layers.delta_rule import gated_delta_rule
from layers.dispatch.backends import why_not
from layers.gated_attention import GatedAttention
from layers.interp.implicit_attention import implicit_attention, recalled
from layers.moe import SparseMoE
from layers.norm import l2_normalise
from layers.rope import rotation
from layers.segments import Segments
from layers.variants.simple_gla import simple_gla

T = 90
GARBAGE = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38])
RULES = [(gated_delta_rule, b) for b in ("recurrent", "chunked", "chunked_recompute", "cpp")]
RULES += [(simple_gla, b) for b in ("recurrent", "chunked")]
EVERY_RULE = pytest.mark.parametrize("rule, backend", RULES)

PADDED = torch.tensor([[-1] * 7 + [0] * (T - 12) + [-1] * 5, [0] * (T - 20) + [-1] * 20])
PACKED = torch.tensor([[0] * 20 + [1] * 10 + [2] * (T - 30), [0] * 5 + [1] * 68 + [2] * (T - 73)])
UNREAL = PADDED < 0
OTHER = PACKED == 1


def skip_unless(operation, backend):
    with torch.no_grad():
        reason = None if backend == "auto" else why_not(operation, backend, torch.device("cpu"), torch.float32)
    if reason:
        pytest.skip(f"{backend} cannot run here")


def rule_inputs():
    torch.manual_seed(0)
    return {
        "q": l2_normalise(torch.randn(2, T, 2, 16), scale=0.25),
        "k": l2_normalise(torch.randn(2, T, 2, 16)),
        "v": torch.randn(2, T, 4, 16),
        "log_decay": -torch.rand(2, T, 4),
        "beta": torch.rand(2, T, 4),
        "state": torch.randn(2, 4, 16, 16),
    }


def spoilt(x, where, value):
    """x (b t …) with `value` at the given tokens."""
    return x.masked_fill(where.view(*where.shape, *(1,) * (x.ndim - 2)), value)


def gradients(run, inputs, kept):
    """Outputs at the tokens `kept`, and the gradients of their sum at these tokens."""
    x = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    o, *rest = run(**x)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    ((o * weights)[kept].sum() + sum(r.square().sum() for r in rest)).backward()
    at = {n: v.grad[kept] if v.shape[:2] == kept.shape else v.grad for n, v in x.items()}
    return {"o": o[kept], **{f"result {i}": r for i, r in enumerate(rest)}, **at}


def same(a, b, what=torch.equal):
    for name in a:
        assert a[name].isfinite().all(), name
        assert what(a[name], b[name]), name


@EVERY_RULE
@GARBAGE
def test_rules_at_padding(rule, backend, garbage):
    skip_unless("delta_rule", backend)
    segments, found = Segments.from_document_ids(PADDED), []
    for value in (0.0, garbage):
        x = {n: v if n == "state" else spoilt(v, UNREAL, value) for n, v in rule_inputs().items()}
        found.append(gradients(lambda **x: rule(**x, segments=segments, backend=backend), x, ~UNREAL))
    same(*found)


@EVERY_RULE
@GARBAGE
@pytest.mark.parametrize("names", ["q", "k", "v", "beta", "q k v beta"])
def test_rules_in_another_packed_sequence(rule, backend, garbage, names):
    """The other sequences and the last state equal those of separate runs."""
    skip_unless("delta_rule", backend)
    segments, x = Segments.from_document_ids(PACKED), rule_inputs()
    x |= {n: spoilt(x[n], OTHER, garbage) for n in names.split()}
    found = gradients(lambda **x: rule(**x, segments=segments, backend=backend), x, ~OTHER)

    def alone(state, **x):
        rows, last = [], []
        for row in (0, 1):
            first, middle, end = PACKED[row].unique_consecutive(return_counts=True)[1].tolist()
            here = {n: v[row : row + 1].split((first, middle, end), dim=1) for n, v in x.items()}
            a, _ = rule(**{n: v[0] for n, v in here.items()}, state=state[row : row + 1], backend=backend)
            c, s = rule(**{n: v[2] for n, v in here.items()}, backend=backend)
            rows.append(torch.cat((a, torch.zeros_like(here["v"][1]), c), dim=1))
            last.append(s)
        return torch.cat(rows), torch.cat(last)

    close = lambda a, b: torch.allclose(a, b, rtol=0, atol=2e-6 * max(1, b.abs().max().item()))  # noqa: E731
    same(found, gradients(alone, x, ~OTHER), close)


@EVERY_RULE
@GARBAGE
def test_rules_in_the_row_beside(rule, backend, garbage):
    skip_unless("delta_rule", backend)
    beside, found = torch.zeros(2, T, dtype=torch.bool), []
    beside[1] = True
    for value in (0.0, garbage):
        x = {n: v if n == "state" else spoilt(v, beside, value) for n, v in rule_inputs().items()}

        def first_row(**x):
            o, state = rule(**x, backend=backend)
            return o, state[:1]

        both = gradients(first_row, x, ~beside)
        found.append(both | {"state": both["state"][:1]})
    same(*found)


@GARBAGE
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("ids, where", [(PADDED, UNREAL), (PACKED, OTHER)], ids=["padded", "packed"])
def test_convolution(garbage, backend, ids, where):
    torch.manual_seed(0)
    x, weight, state = torch.randn(2, T, 8), torch.randn(8, 4), torch.randn(2, 3, 8)
    segments, found = Segments.from_document_ids(ids), []
    for value in (0.0, garbage):
        inputs = {"x": spoilt(x, where, value), "state": state}
        run = lambda **x: causal_conv(**x, weight=weight, segments=segments, backend=backend)  # noqa: E731
        found.append(gradients(run, inputs, ~where))
    same(*found)


@GARBAGE
@pytest.mark.parametrize("backend", ["sdpa", "eager", "auto", "cpp"])
@pytest.mark.parametrize("ids, where", [(PADDED, UNREAL), (PACKED, OTHER)], ids=["padded", "packed"])
def test_attention(garbage, backend, ids, where):
    """Without gradients in tiles, with gradients with a mask; "cpp" has no gradients."""
    skip_unless("attention", backend)
    torch.manual_seed(0)
    layer = GatedAttention(32, heads=4, kv_heads=2, head_dim=16, backend=backend)
    x, segments = torch.randn(2, T, 32), Segments.from_document_ids(ids)
    rope = rotation(segments.positions, rotary_dim=4, theta=1e4, dtype=x.dtype)
    run = lambda x: (layer(x, rope, segments=segments),)  # noqa: E731
    exactly = torch.equal if ids is PADDED else lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-6)
    with torch.no_grad():
        want, got = (run(spoilt(x, where, value))[0][~where] for value in (0.0, garbage))
    assert exactly(want, got)
    if backend != "cpp":
        same(*(gradients(run, {"x": spoilt(x, where, value)}, ~where) for value in (0.0, garbage)), exactly)


@GARBAGE
@pytest.mark.parametrize("backend", ["loop", "grouped", "cpp"])
def test_experts_and_what_is_counted_of_them(garbage, backend):
    skip_unless("experts", backend)
    torch.manual_seed(0)
    layer = SparseMoE(32, experts=8, top_k=2, intermediate_size=16, shared_intermediate_size=16, backend=backend)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, found = torch.randn(2, T, 32), []
    for value in (0.0, garbage):
        layer.zero_grad()

        def run(x):
            y, stats = layer(x, mask=~UNREAL)
            return y, *stats

        got = gradients(run, {"x": spoilt(x, UNREAL, value)}, ~UNREAL)
        found.append(got | {n: p.grad for n, p in layer.named_parameters()})
    same(*found)


@GARBAGE
def test_a_layer_seen_as_attention(garbage):
    segments, found = Segments.from_document_ids(PADDED), []
    for value in (0.0, garbage):
        x = {n: v if n == "state" else spoilt(v, UNREAL, value) for n, v in rule_inputs().items()}
        a = implicit_attention(x["q"], x["k"], x["log_decay"], x["beta"], segments=segments)
        r = recalled(x["k"], x["v"], x["log_decay"], x["beta"], state=x["state"], segments=segments)
        found.append({"A": a.transpose(1, 2)[~UNREAL], "recalled": r[~UNREAL]})
    same(*found)


PAD = 256  # an id that `tiny`'s byte tokenizer never produces


def model(**changes):
    torch.manual_seed(0)
    return q.Qwen3Next(q.presets.tiny(initializer_range=0.06, tie_word_embeddings=False, **changes)).eval()


def rows():
    ids = torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(UNREAL, PAD), Segments.from_document_ids(PADDED)


@GARBAGE
def test_a_models_losses_and_all_gradients_with_a_garbage_pad_token(garbage):
    """The embedding of the pad token is never used and has no gradient, including MTP and statistics."""
    ids, segments = rows()
    found = []
    for value in (0.0, garbage):
        m = model()
        with torch.no_grad():
            m.embed_tokens.weight[PAD] = value
        loss = m.loss(ids, segments=segments)
        loss.total.backward()
        assert not m.embed_tokens.weight.grad[PAD].any()
        logits = m(ids, segments=segments).logits[~UNREAL]
        losses = {n: getattr(loss, n).detach() for n in ("total", "lm", "mtp", "balance", "z", "load")}
        found.append(losses | {"logits": logits} | {n: p.grad for n, p in m.named_parameters()})
    assert found[0]["mtp"] > 0
    same(*found)


@GARBAGE
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_padded_prompts_in_a_cache(garbage, attention):
    """Prefill, then a step and a forward of several tokens."""
    ids, segments = rows()
    found = []
    for value in (0.0, garbage):
        m = model()
        m.set_backend("attention", attention)
        with torch.no_grad():
            m.embed_tokens.weight[PAD] = value
        cache = m.new_cache(2, mtp=True)
        for _ in m.prefill(ids, cache, 64, segments=segments):
            pass
        first = cache.last_logits
        step = m.step(ids[:, 30:31], cache)
        more = m(ids[:, 40:46], cache=cache).logits
        found.append({"first": first, "step": step, "more": more, "draft": m.draft(cache, ids[:, 50])})
    same(*found)


@GARBAGE
def test_a_token_without_a_sound_embedding_spoils_its_own_sequence_alone(garbage):
    ids = torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(0)).masked_fill(OTHER, PAD)
    m = model()
    with torch.no_grad():
        m.embed_tokens.weight[PAD] = garbage
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = m(ids, segments=Segments.from_document_ids(PACKED)).logits
            for row in (0, 1):
                for own in (PACKED[row] == 0, PACKED[row] == 2):
                    alone = m(ids[row : row + 1, own]).logits[0]
                    torch.testing.assert_close(got[row, own], alone, rtol=0, atol=1e-4)


def test_stale_keys_of_a_shorter_row_are_not_read():
    """The positions after a row's end may have any values, left from before a rollback."""
    m = model(num_experts=0)
    m.set_backend("attention", "eager")  # the backend with a mask; the others process rows separately
    ids, mask = torch.randint(0, 256, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    found = []
    for value in (0.0, math.nan):
        cache = m.new_cache(2)
        for _ in m.prefill(ids, cache, segments=Segments.from_mask(mask)):
            pass
        for state in cache.layers:
            if hasattr(state, "parts"):
                for x in state.parts(0, 20)[0]:
                    x[1, :, 14:] = value
        found.append({"logits": m(ids[:, :2], cache=cache).logits})
    same(*found)


# ---- a sequence whose outputs get gradients that are not finite


def others(run, inputs, value):
    """Gradients at the other sequences' tokens, where one packed sequence's outputs get `value` as gradient."""
    x = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    o, *rest = run(**x)
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward([o, *rest], [spoilt(upstream, OTHER, value), *(torch.ones_like(r) for r in rest)])
    if not math.isfinite(value):
        assert not any(t.grad[OTHER].isfinite().all() for n, t in x.items() if n in ("v", "x"))
    return {n: t.grad[~OTHER] if t.shape[:2] == OTHER.shape else t.grad for n, t in x.items()}


UPSTREAM = pytest.mark.parametrize("upstream", [math.nan, math.inf])


@EVERY_RULE
@UPSTREAM
def test_rules_under_gradients_of_another_packed_sequence(rule, backend, upstream):
    """The others have the gradients that they have where those are zero, to the bit."""
    skip_unless("delta_rule", backend)
    run = lambda **x: rule(**x, segments=Segments.from_document_ids(PACKED), backend=backend)  # noqa: E731
    same(*(others(run, rule_inputs(), value) for value in (upstream, 0.0)))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "auto"])
@UPSTREAM
def test_attention_under_gradients_of_another_packed_sequence(backend, upstream):
    torch.manual_seed(0)
    layer = GatedAttention(32, heads=4, kv_heads=2, head_dim=16, backend=backend)
    x, segments = torch.randn(2, T, 32), Segments.from_document_ids(PACKED)
    rope = rotation(segments.positions, rotary_dim=4, theta=1e4, dtype=x.dtype)
    run = lambda x: (layer(x, rope, segments=segments),)  # noqa: E731
    same(*(others(run, {"x": x}, value) for value in (upstream, 0.0)))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@UPSTREAM
def test_convolution_under_gradients_of_another_packed_sequence(backend, upstream):
    torch.manual_seed(0)
    x, weight, segments = torch.randn(2, T, 8), torch.randn(8, 4), Segments.from_document_ids(PACKED)
    run = lambda x: causal_conv(x, weight, segments=segments, backend=backend)[:1]  # noqa: E731
    same(*(others(run, {"x": x}, value) for value in (upstream, 0.0)))


# ---- a sequence without labels: what docs/numerics.md says of its gradients

IDS = torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(0))
REAL, LEFT_OUT = (Segments.from_document_ids(x) for x in (PACKED, PACKED.masked_fill(OTHER, -1)))


def without_labels(source, garbage, segments, **changes):
    """The losses; gradients of lm + mtp by parameter, and at each token of the stream.

    source: "embedding", or ("put", NAME) or ("add", NAME): what a hook does with garbage at the sequence's tokens.
    """
    m, ids, where, stream = model(**changes), IDS, OTHER[..., None], []
    if source == "embedding":
        ids = ids.masked_fill(OTHER, PAD)
        with torch.no_grad():
            m.embed_tokens.weight[PAD] = garbage

    def keep(x, hook):
        stream.append(x)
        x.retain_grad()

    def spoil(x, hook):
        return x.masked_fill(where, garbage) if source[0] == "put" else x + torch.zeros(()).masked_fill(where, garbage)

    with m.hooks([("hook_embed", keep)] + ([] if source == "embedding" else [(source[1], spoil)])):
        losses = m.loss(ids, segments=segments, labels=IDS.masked_fill(OTHER, -100))
    (losses.lm + losses.mtp).backward()
    return losses, {n: p.grad for n, p in m.named_parameters()}, stream[0].grad[~OTHER]


@cache
def left_out(dense):
    return without_labels("embedding", math.nan, LEFT_OUT, **({"num_experts": 0} if dense else {}))


# Where garbage comes from, and the parameters that its sequence's activations and gradients do not pass.
SPARED = {
    "embedding": ("lm_head.",),
    ("put", "blocks.1.hook_resid_post"): ("lm_head.", "blocks.0.", "blocks.1."),
    ("put", "hook_final_norm"): ("lm_head.", "blocks.", "norm."),
    ("add", "blocks.1.hook_resid_post"): ("lm_head.",),
    ("add", "hook_final_norm"): ("lm_head.",),
}


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("source", SPARED, ids=lambda s: s if isinstance(s, str) else " ".join(s))
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "mixture"])
def test_gradients_beside_a_sequence_without_labels(source, garbage, dense):
    """What is not spoilt is, to rounding, what it is without that sequence; all else is spoilt."""
    losses, gradients, stream = without_labels(source, garbage, REAL, **({"num_experts": 0} if dense else {}))
    expected, wanted, its_stream = left_out(dense)
    assert expected.total.isfinite()
    assert all(x.isfinite().all() for x in wanted.values())  # so absent tokens are the way to leave it out

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.detach().abs().max().item())

    close(losses.lm, expected.lm)
    close(losses.mtp, expected.mtp)
    assert bool(losses.total.isfinite()) == (dense or math.isfinite(garbage))  # routers count its tokens
    close(stream, its_stream)
    names = gradients.keys() - {"embed_tokens.weight"}
    finite = {name for name in names if gradients[name].isfinite().all()}
    assert finite == {n for n in names if n.startswith(SPARED[source]) or math.isfinite(garbage)}
    for name in finite:
        close(gradients[name], wanted[name])
    rows = gradients["embed_tokens.weight"]
    spared = rows.isfinite().all(-1)
    assert math.isfinite(garbage) != bool((~spared).any())
    assert set((~spared).nonzero().flatten().tolist()) <= ({PAD} if source == "embedding" else set(IDS[OTHER].tolist()))
    close(rows[spared], wanted["embed_tokens.weight"][spared])
