"""State and implicit attention of Gated DeltaNet layers: patches act as in the recurrence, on every route.

In fp64, where rounding is negligible.
"""

import pytest
import torch
from conftest import small_model

import qwen3next as q
from layers.segments import Segments

STATE, PATTERN = "blocks.1.linear_attn.hook_state", "blocks.1.linear_attn.hook_pattern"
WRITTEN, ERASED = "blocks.1.linear_attn.hook_written", "blocks.1.linear_attn.hook_recalled"
BETA, VALUE, OUTPUT = (f"blocks.1.linear_attn.hook_{name}" for name in ("beta", "v", "o"))
EXACT = {"rtol": 0, "atol": 1e-10}


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def slow_forgetting(**changes):
    """States that last for hundreds of tokens, so that an early patch has a visible effect."""
    model = small_model(dtype=torch.float64, **changes)
    with torch.no_grad():
        for block in model.blocks:
            if block.mixer == "linear_attention":
                block.linear_attn.A_log.fill_(-5.0)
    return model


@pytest.fixture
def model():
    return slow_forgetting()


def logits_of(model, tokens, hooks, **options):
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks, **options).logits


@pytest.mark.parametrize("positions", [[0], [2, 65], [63, 64], [69]])
def test_a_patched_state_acts_alike_on_every_route_in_values_and_gradients(model, positions):
    tokens, results = ids(2, 70), []
    for backend in ("chunked", "recurrent"):
        model.set_backend("delta_rule", backend)
        model.zero_grad()
        extra = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        extra.requires_grad_()
        with model.materialize(state={1: positions}):
            hooks = [(STATE, lambda state, _hook, extra=extra: state * 0.5 + extra)]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks).logits
        logits.square().mean().backward()
        results.append(
            {"logits": logits.detach(), "extra": extra.grad} | {n: p.grad for n, p in model.named_parameters()}
        )
    assert (results[0]["extra"] is None) == (positions == [69])  # no token reads the last state
    for name, chunked in results[0].items():
        if chunked is not None:
            torch.testing.assert_close(
                chunked, results[1][name], msg=lambda text, name=name: f"{name}: {text}", **EXACT
            )


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
@pytest.mark.parametrize("p", [0, 4, 63, 64, 80])
def test_the_state_at_a_position_is_what_a_cache_holds_and_a_patch_is_what_a_changed_cache_does(model, backend, p):
    model.set_backend("delta_rule", backend)
    tokens, cache = ids(2, 90), model.new_cache(batch=2, max_len=90)
    with torch.no_grad(), model.materialize(state={1: [p]}):
        plain = model(tokens).logits
        before, acts = model.run_with_cache(tokens, names_filter=STATE)
        patched = logits_of(model, tokens, [(STATE, lambda state, _hook: state.flip(0))])
        model(tokens[:, : p + 1], cache=cache)
        memory = cache.layers[1].recurrent
        torch.testing.assert_close(acts[STATE], memory[:, None], **EXACT)
        cache.layers[1].recurrent = memory.flip(0)
        after = model(tokens[:, p + 1 :], cache=cache).logits
    torch.testing.assert_close(before, plain, **EXACT)
    torch.testing.assert_close(patched[:, : p + 1], plain[:, : p + 1], **EXACT)
    torch.testing.assert_close(patched[:, p + 1 :], after, **EXACT)
    assert (after - plain[:, p + 1 :])[:, -1].abs().max() > 1e-3


def test_positions_are_absolute_in_chunks_and_in_generation(model):
    tokens, cache, fired = ids(1, 12), model.new_cache(max_len=20), []

    def note(state, hook):
        fired.append(hook.ctx["position"])

    with model.materialize(state={1: [2, 7, 13, 19, 400]}):
        with model.hooks([(STATE, note)]):
            list(model.prefill(tokens, cache, chunk_size=5))
        assert fired == [2, 7]
        q.generate(model, tokens, cache=cache, max_new_tokens=5, stop_tokens=[], fwd_hooks=[(STATE, note)])
        assert fired == [2, 7, 13]
        with pytest.raises(RuntimeError, match="hook_state did not fire"), model.hooks([(STATE, note)]):
            model(ids(1, 1), cache=cache)  # position 16


def test_positions_are_absolute_where_a_cache_logs_updates(model):
    tokens, cache, fired = ids(1, 15), model.new_cache(max_len=20, history=4), []
    note = (STATE, lambda state, hook: fired.append(hook.ctx["position"]))
    with torch.no_grad(), model.materialize(state={1: [7, 12, 13]}), model.hooks([note]):
        for part in tokens.split([5, 7, 1, 1, 1], dim=1):
            model(part, cache=cache)
    assert fired == [7, 12, 13]


def test_a_state_patched_in_generation_is_one_patched_in_prefill(model):
    tokens = ids(1, 30)
    hooks = [(STATE, lambda state, _hook: -state)]
    with torch.no_grad(), model.materialize(state={1: [12, 25]}):
        whole = logits_of(model, tokens, hooks)
        cache = model.new_cache(max_len=30)
        with model.hooks(hooks):
            parts = [model(tokens[:, :20], cache=cache).logits]
            parts += [model(tokens[:, t : t + 1], cache=cache).logits for t in range(20, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_states_of_packed_and_padded_rows(model, backend):
    """Exact if every row has the position once and in the same column, otherwise refused."""
    model.set_backend("delta_rule", backend)
    hooks, lengths = [(STATE, lambda state, _hook: -state)], [50, 3, 30]
    tokens, packed = ids(1, 83), Segments.from_lengths([[50, 3, 30]])
    with torch.no_grad(), model.materialize(state={1: [40]}):
        whole = logits_of(model, tokens, hooks, segments=packed).split(lengths, dim=1)
        for part, got in zip(tokens.split(lengths, dim=1), whole, strict=True):
            alone = logits_of(model, part, hooks) if part.shape[1] > 40 else model(part).logits
            torch.testing.assert_close(got, alone, **EXACT)
    with torch.no_grad(), model.materialize(state={1: [1, 8]}):
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[:, :3] = 0  # equal in both rows
        mask[1, 60:] = 0
        got = logits_of(model, ids(2, 70), hooks, segments=Segments.from_mask(mask))
        alone = logits_of(model, ids(2, 70)[1:, 3:60], hooks)
        torch.testing.assert_close(got[1:, 3:60], alone, **EXACT)
        mask[0, 3] = 0
        for segments, rows in ((packed, tokens), (Segments.from_mask(mask), ids(2, 70))):
            with pytest.raises(ValueError, match="do not reach position 1 in one and the same column"):
                model.run_with_hooks(rows, segments=segments, fwd_hooks=hooks)


def at(position, fn):
    return lambda x, hook: fn(x) if hook.ctx["position"] == position else None


def test_nothing_written_is_beta_zero_and_acts_on_later_tokens(model):
    """The oracle patches the token's β instead, on another route."""
    tokens = ids(2, 40)

    def no_beta(beta, _hook):
        return beta.index_fill(1, torch.tensor([7]), 0.0)

    wanted = logits_of(model, tokens, [(BETA, no_beta)])
    model.set_backend("delta_rule", "recurrent")
    got = logits_of(model, tokens, [(WRITTEN, at(7, torch.zeros_like))])
    torch.testing.assert_close(got, wanted, **EXACT)
    assert (got - logits_of(model, tokens, []))[:, -1].abs().max() > 1e-4
    model.set_backend("delta_rule", "chunked")
    with pytest.raises(RuntimeError, match=r'set_backend\("delta_rule", "recurrent"\)'):
        logits_of(model, tokens, [(WRITTEN, torch.zeros_like)])


def test_nothing_erased_is_linear_attention_with_decay(model):
    tokens = ids(2, 40)
    model.set_backend("delta_rule", "recurrent")
    names = [f"blocks.1.linear_attn.hook_{n}" for n in ("q", "k", "v", "beta", "log_decay", "o")]
    with model.hooks([(ERASED, lambda x, _hook: torch.zeros_like(x))]):
        _, acts = model.run_with_cache(tokens, names_filter=names)
    q_, k, v, beta, g, o = (acts[name].transpose(1, 2) for name in names)
    q_, k = q_.repeat_interleave(2, 1), k.repeat_interleave(2, 1)
    since = g.cumsum(2)
    decay = (since[..., :, None] - since[..., None, :]).tril().exp().tril()
    torch.testing.assert_close((q_ @ k.mT * decay * beta[..., None, :]) @ v, o, **EXACT)


def test_what_is_kept_rebuilds_the_state(model):
    """S_t = Σ exp(G_t − G_s) k_s u_sᵀ, with the tensors of points that fire per token joined along time."""
    model.set_backend("delta_rule", "recurrent")
    names = [f"blocks.1.linear_attn.hook_{n}" for n in ("k", "written", "erased", "v", "beta", "log_decay", "state")]
    with model.materialize(state={1: [3, 11]}):
        _, acts = model.run_with_cache(ids(2, 12), names_filter=names)
    k, u, erased, v, beta, g, states = (acts[name] for name in names)
    torch.testing.assert_close(u, beta[..., None] * (v - erased), **EXACT)
    decay = (g.sum(1, keepdim=True) - g.cumsum(1)).exp()
    rebuilt = torch.einsum("bth,bthk,bthv->bhkv", decay, k.repeat_interleave(2, 2), u)
    torch.testing.assert_close(rebuilt, states[:, 1], **EXACT)
    assert states.shape == (2, 2, 4, 16, 24)


@pytest.mark.parametrize("t", [1, 65])
def test_the_matrix_gives_the_output_also_after_a_cache(model, t):
    tokens, cache = ids(2, 20 + t), model.new_cache(batch=2, max_len=20 + t)
    with torch.no_grad():
        plain = model(tokens).logits
        with model.materialize(pattern=[1]), model.hooks([(PATTERN, lambda a, _hook: a.clone())]):
            torch.testing.assert_close(model(tokens).logits, plain, **EXACT)
            model(tokens[:, :20], cache=cache)
            torch.testing.assert_close(model(tokens[:, 20:], cache=cache).logits, plain[:, 20:], **EXACT)


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_an_edited_entry_is_an_exact_knockout_of_one_edge(model, backend):
    """Oracle: the contribution of s to t is the change of t's output when s has no value; other outputs are equal."""
    model.set_backend("delta_rule", backend)
    tokens, t, s = ids(2, 70), 66, 5

    def cut(a, _hook):
        a = a.clone()
        a[:, :, t, s] = 0
        return a

    def no_value(v, _hook):
        return v.index_fill(1, torch.tensor([s]), 0.0)

    def output(hooks):
        with model.hooks(hooks):
            return model.run_with_cache(tokens, names_filter=OUTPUT)[1][OUTPUT]

    plain, without = output([]), output([(VALUE, no_value)])
    with model.materialize(pattern=[1]):
        knocked = output([(PATTERN, cut)])
    wanted = plain.clone()
    wanted[:, t] = without[:, t]
    torch.testing.assert_close(knocked, wanted, **EXACT)
    assert (plain[:, t] - without[:, t]).abs().max() > 1e-6


def test_the_matrix_and_a_patched_state_of_one_layer_add_up(model):
    tokens, hooks = ids(2, 70), [(STATE, lambda state, _hook: -state)]
    with model.materialize(state={1: [30]}):
        wanted = logits_of(model, tokens, hooks)
    with model.materialize(state={1: [30]}, pattern=[1]):
        got = logits_of(model, tokens, [*hooks, (PATTERN, lambda a, _hook: a.clone())])
    torch.testing.assert_close(got, wanted, **EXACT)


def test_gradients_reach_matrix_and_state(model):
    tokens = ids(1, 20)
    with model.materialize(state={1: [4, 9]}, pattern=[1]):
        _, acts = model.run_with_cache(tokens, names_filter=[STATE, PATTERN], incl_bwd=lambda logits: logits[0, -1, 0])
        assert acts[f"{STATE}_grad"].shape == (1, 2, 4, 16, 24)
        gradient = acts[f"{PATTERN}_grad"]

        def nudge(a, _hook, size):
            a = a.clone()
            a[0, 2, 15, 3] += size
            return a

        ends = [
            logits_of(model, tokens, [(PATTERN, lambda a, hook, size=size: nudge(a, hook, size))])[0, -1, 0]
            for size in (1e-4, -1e-4)
        ]
    torch.testing.assert_close(gradient[0, 2, 15, 3], (ends[0] - ends[1]) / 2e-4, rtol=1e-5, atol=1e-9)


def test_what_is_exposed_is_put_back(model):
    layer, softmax = model.blocks[1].linear_attn, model.blocks[3].self_attn
    model.materialize(state={1: [5]}, pattern=[-1])
    with model.materialize(state={1: [7, 2, 7]}):
        assert layer.materialized_positions == (2, 7)
        assert not softmax.materialized_pattern
    assert layer.materialized_positions == (5,)
    assert softmax.materialized_pattern
    model.materialize()
    assert layer.materialized_positions == ()
    assert not softmax.materialized_pattern


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"state": {3: [0]}}, "softmax attention and has no recurrent state"),
        ({"state": {4: [0]}}, "no layer 4"),
        ({"pattern": [-5]}, "no layer -5"),
        ({"state": {0: [-1]}}, "must be integers from 0, the start of the text"),
    ],
)
def test_what_cannot_be_exposed_is_refused_and_nothing_changes(model, request_, sentence):
    model.materialize(state={0: [1]})
    with pytest.raises(ValueError, match=sentence):
        model.materialize(**request_)
    assert model.blocks[0].linear_attn.materialized_positions == (1,)


def test_exposing_without_looking_changes_no_bit(model):
    tokens = ids(1, 70)
    plain = model(tokens).logits
    with model.materialize(state={0: [3]}, pattern=[0, 1]):
        assert torch.equal(model(tokens).logits, plain)
