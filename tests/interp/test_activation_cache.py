"""Sums over parts, rebuilt recurrent states and attention matrices against the model, in fp64."""

import io

import pytest
import torch
from conftest import small_model
from rich.console import Console

from layers.segments import Segments
from qwen3next.interp import ActivationCache, NotCachedError

IDS = torch.randint(0, 97, (2, 70), generator=torch.Generator().manual_seed(0))
EXACT = {"rtol": 0, "atol": 1e-12}


def cached(model, ids=IDS, segments=None, **options):
    return model.run_with_cache(ids, segments=segments, **options)[1]


@pytest.fixture(scope="module")
def cache():
    return cached(small_model(dtype=torch.float64))


def test_names_in_full_and_in_short(cache):
    assert cache["resid_post", 3] is cache["blocks.3.hook_resid_post"]
    assert cache["beta", 0] is cache["blocks.0.linear_attn.hook_beta"]
    assert cache["linear_attn.hook_q", 0] is cache["q", 0]
    assert cache["router_logits", -1] is cache["blocks.3.mlp.hook_router_logits"]
    assert cache["embed"] is cache["hook_embed"]
    assert ("beta", 3) not in cache
    assert dict(cache).keys() == cache.acts.keys()
    with pytest.raises(NotCachedError, match="no hook point beta in block 3"):
        cache["beta", 3]


@pytest.mark.parametrize("changes", [{}, {"zero_centred_norms": False}, {"num_experts": 0}])
def test_components_sum_to_the_stream_and_their_attributions_to_the_logits(changes):
    model = small_model(dtype=torch.float64, **changes)
    cache = cached(model)
    for layer in (0, 2, None):
        stack, labels = cache.decompose_resid(layer, return_labels=True)
        assert len(stack) == len(labels)
        end = cache["resid_post", 3] if layer is None else cache["resid_pre", layer]
        torch.testing.assert_close(stack.sum(0), end, **EXACT)
    torch.testing.assert_close(cache.decompose_resid(1, mlp_input=True).sum(0), cache["resid_mid", 1], **EXACT)
    stack = cache.decompose_resid()
    logits = cache["hook_logits"]
    torch.testing.assert_close(cache.apply_ln_to_stack(stack).sum(0), cache["final_norm"], **EXACT)
    torch.testing.assert_close(cache.logit_attrs(stack, 5).sum(0), logits[..., 5], **EXACT)
    wanted = logits.gather(-1, IDS[..., None])[..., 0]
    torch.testing.assert_close(cache.logit_attrs(stack, IDS).sum(0), wanted, **EXACT)
    lead = cache.logit_attrs(stack[:, :, -1:], IDS[:, :1], 7, pos_slice=-1).sum(0)[:, 0]
    torch.testing.assert_close(lead, logits[[0, 1], -1, IDS[:, 0]] - logits[:, -1, 7], **EXACT)


def test_norms_inside_are_frozen_too(cache):
    stack = cache.decompose_resid(2, mlp_input=True)
    block = cache.model.blocks[2]
    normed = cache.apply_ln_to_stack(stack, 2, mlp_input=True).sum(0)
    torch.testing.assert_close(normed, block.post_attention_layernorm(cache["resid_mid", 2]), **EXACT)


def test_modes_are_parts_of_all(cache):
    everything, labels = cache.decompose_resid(return_labels=True)
    for mode in ("attn", "mlp"):
        part, names = cache.decompose_resid(mode=mode, return_labels=True)
        assert torch.equal(part, everything[[labels.index(name) for name in names]])
    assert labels[:3] == ["embed", "0_gdn_out", "0_mlp_out"]
    assert labels[-2:] == ["3_attn_out", "3_mlp_out"]
    with pytest.raises(ValueError, match="choose all, attn or mlp"):
        cache.decompose_resid(mode="gdn")


def test_accumulated_and_lens(cache):
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"]
    assert labels[-1] == "final_post"
    assert torch.equal(stack[-1], cache["resid_post", 3])
    normed = cache.accumulated_resid(apply_ln=True, pos_slice=[3, 5])
    torch.testing.assert_close(normed[-1], cache["final_norm"][:, [3, 5]], **EXACT)
    lens = cache.logit_lens(top=3)
    best = cache["hook_logits"].log_softmax(-1).topk(3)
    assert lens.ids.shape == (5, 2, 70, 3)
    assert torch.equal(lens.ids[-1], best.indices)
    torch.testing.assert_close(lens.log_probs[-1], best.values, **EXACT)


def test_heads_sum_to_what_the_mixer_wrote(cache):
    stack, labels = cache.stack_head_results(return_labels=True)
    for i in range(4):
        mine = [j for j, label in enumerate(labels) if label.startswith(f"L{i}H")]
        assert len(mine) == 4
        torch.testing.assert_close(stack[mine].sum(0), cache["attn_out", i], **EXACT)
        torch.testing.assert_close(cache.stack_head_results(i, pos_slice=2), stack[mine][:, :, 2:3], **EXACT)
    assert not stack.requires_grad


def test_stacks_over_layers_leave_the_other_kind_out(cache):
    beta, layers = cache.stack_activation("beta")
    assert layers == [0, 1, 2]
    assert torch.equal(beta[1], cache["beta", 1])
    assert cache.stack_activation("resid_mid", layers=[-1, 0])[1] == [3, 0]
    with pytest.raises(ValueError, match=r"linear_attn\.q or self_attn\.q"):
        cache.stack_activation("q")


@pytest.mark.parametrize("layer", [0, 2])
def test_states_are_those_that_generation_carries(cache, layer):
    model = cache.model
    places = [69, 0, 63, 64, -3]
    states = cache.state(layer, places)
    for i, place in enumerate(places):
        carried = model.new_cache(batch=2, max_len=70)
        model(IDS[:, : place % 70 + 1], cache=carried)
        torch.testing.assert_close(states[:, i], carried.layers[layer].recurrent, **EXACT)
    assert torch.equal(cache.state(layer, 63), states[:, 2])


def test_what_the_forward_was_given_by_position_counts():
    model, segments = small_model(), Segments.from_lengths([[30, 40], [70]])
    _, acts = model.run_with_cache(IDS, segments)
    assert acts.segments is segments
    assert torch.equal(acts.ledger(0).mask, segments.mask)
    _, acts = model.run_with_cache(IDS, segments, pos_slice=slice(60, None))
    with pytest.raises(ValueError, match="keep a contiguous range"):
        acts.ledger(0)


def test_states_of_a_continued_forward():
    model = small_model(dtype=torch.float64)
    carried = model.new_cache(batch=2, max_len=70)
    model(IDS[:, :30], cache=carried)
    before = carried.layers[1].recurrent
    _, acts = model.run_with_cache(IDS[:, 30:], cache=carried)
    cache = ActivationCache(acts, model)
    torch.testing.assert_close(cache.state(1, -1, before=before), carried.layers[1].recurrent, **EXACT)
    with pytest.raises(ValueError, match="give `before`"):
        cache.state(1, -1)
    ledger = cache.ledger(1, before=before)
    torch.testing.assert_close(ledger.written, cached(model).ledger(1).written[:, 30:], **EXACT)


def test_implicit_attention_and_states_of_packed_and_padded_rows():
    segments = Segments.from_lengths([[20, 40], [33]])
    model = small_model(dtype=torch.float64)
    cache = cached(model, IDS[:, :60], segments)
    a = cache.implicit_attention(1)
    o = torch.einsum("bhts,bshv->bthv", a, cache["v", 1])
    torch.testing.assert_close(o, cache["o", 1], **EXACT)
    assert not a[0, :, 20:, :20].any()
    alone = cached(model, IDS[:1, 20:60])
    torch.testing.assert_close(cache.state(1, 59)[:1], alone.state(1, 39), **EXACT)
    ledger, other = cache.ledger(1), alone.ledger(1)
    torch.testing.assert_close(ledger.erased[:1, 20:], other.erased, **EXACT)
    assert not ledger.written[1, 33:].any()


def test_the_ledger_adds_up(cache):
    """The state changes by k uᵀ, with |k| = 1 up to the ε of its normalisation."""
    ledger, states = cache.ledger(0), cache.state(0, [10, 11])
    move = states[:, 1] - ledger.decay[:, 11, :, None, None] * states[:, 0]
    torch.testing.assert_close(move.flatten(2).norm(dim=-1), ledger.written[:, 11], rtol=1e-4, atol=0)
    torch.testing.assert_close(ledger.erased, ledger.beta * ledger.recalled)
    torch.testing.assert_close(0.5 ** (1 / ledger.half_life), ledger.decay)
    summary = ledger.summary()
    torch.testing.assert_close(summary["beta"], cache["beta", 0].mean((0, 1)))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(ledger)
    assert "half-life, tokens" in console.export_text()


def test_slices_are_the_same_as_a_smaller_forward(cache):
    model = cache.model
    front = cache.slice(batch=1, pos=slice(0, 40))
    small = cached(model, IDS[1:, :40])
    assert front.keys() == small.keys()
    for name in small:
        torch.testing.assert_close(front[name], small[name], **EXACT)
    torch.testing.assert_close(front.state(1, 39), small.state(1, 39), **EXACT)
    back = cache.slice(pos=[-1])
    torch.testing.assert_close(back.decompose_resid().sum(0), back["resid_post", 3], **EXACT)
    with pytest.raises(ValueError, match="sliced off"):
        back.state(0, 0)
    tail = cache.slice(pos=slice(40, None))
    torch.testing.assert_close(tail.state(1, -1, before=cache.state(1, 39)), cache.state(1, -1), **EXACT)
    torch.testing.assert_close(tail.implicit_attention(1), cache.implicit_attention(1)[:, :, 40:, 40:], **EXACT)
    with pytest.raises(ValueError, match="keep a contiguous range"):
        cache.slice(pos=[0, 2]).implicit_attention(1)


def test_patterns_are_sliced_by_query():
    model = small_model()
    model.set_backend("attention", "eager")
    short = cached(model, names_filter=["blocks.3.self_attn.hook_pattern", "hook_embed"]).slice(pos=slice(-2, None))
    assert short["pattern", 3].shape == (2, 4, 2, 70)


def test_states_and_gradients_are_sliced_where_they_have_tokens():
    model = small_model()
    with model.materialize(state={0: [3, 7]}, pattern=[1]):
        _, acts = model.run_with_cache(IDS, incl_bwd=True)
    short = acts.slice(batch=1, pos=slice(0, 5))
    assert torch.equal(short["state", 0], acts["state", 0][1:])
    assert torch.equal(short["pattern", 1], acts["pattern", 1][1:, :, :5])
    assert torch.equal(short["resid_post_grad", 3], acts["blocks.3.hook_resid_post_grad"][1:, :5])


def test_dtypes_and_files(cache, tmp_path):
    single = cache.to(torch.float32)
    assert single["resid_post", 0].dtype == torch.float32
    assert single["router_indices", 0].dtype == torch.int64
    packed = cached(cache.model, IDS[:, :60], Segments.from_lengths([[20, 40], [33]]))
    for i, one in enumerate((cache, single.slice(pos=[3]), packed)):
        path = tmp_path / f"{i}.safetensors"
        one.save(path)
        again = ActivationCache.load(path, cache.model)
        assert again.keys() == one.keys()
        assert all(torch.equal(again[name], one[name]) for name in one)
        assert again.from_start == one.from_start
    assert torch.equal(again.ledger(0).mask, packed.ledger(0).mask)
    assert len(list(tmp_path.iterdir())) == 3
    for other in (small_model(num_hidden_layers=5), small_model(seed=1)):
        with pytest.raises(ValueError, match="another model"):
            ActivationCache.load(path, other)
    assert ActivationCache.load(path, small_model(dtype=torch.bfloat16)).keys() == packed.keys()


def test_a_failed_save_leaves_the_old_file(cache, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    cache.slice(pos=0).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_what_is_missing_is_said_with_the_filter_that_keeps_it():
    model = small_model()
    cache = cached(model, names_filter="hook_embed")
    with pytest.raises(NotCachedError, match=r"call run_with_cache\(…, names_filter='blocks\.0\.hook_resid_mid'\)"):
        cache["resid_mid", 0]
    with pytest.raises(NotCachedError, match=r"'hook_embed', 'blocks\.\*\.hook_attn_out'"):
        cache.decompose_resid()
    cached(model, names_filter=["hook_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"]).decompose_resid()
    with pytest.raises(NotCachedError, match=r"linear_attn\.hook_v"):
        cache.state(0, 3)
    with pytest.raises(ValueError, match=r"choose one of \[0, 1, 2\]"):
        cache.implicit_attention(3)
    with pytest.raises(ValueError, match="no hook point blocks"):
        ActivationCache({"blocks.7.hook_resid_mid": IDS}, model)


def test_an_output_bias_is_no_heads():
    model = small_model(dtype=torch.float64, attention_bias=True, layer_types=("full_attention",), num_hidden_layers=1)
    cache = cached(model)
    rest = cache["attn_out", 0] - cache.stack_head_results(0).sum(0)
    torch.testing.assert_close(rest, model.blocks[0].self_attn.o_proj.bias.expand_as(rest), **EXACT)


def test_bf16_is_summed_in_fp32():
    cache = cached(small_model(dtype=torch.bfloat16))
    assert cache.decompose_resid().dtype == torch.float32
    assert cache.state(0, 5).dtype == torch.float32
    assert cache.logit_lens().log_probs.dtype == torch.float32
    assert cache.stack_head_results(3).dtype == torch.float32


def test_a_file_of_a_model_with_longer_context(tmp_path):
    model = small_model()
    model.extend_context(2.0)
    kept = cached(model, names_filter="hook_embed")
    kept.save(tmp_path / "acts.safetensors")
    assert torch.equal(ActivationCache.load(tmp_path / "acts.safetensors", model)["hook_embed"], kept["hook_embed"])
    model.extend_context(4.0)
    with pytest.raises(ValueError, match="another model"):
        ActivationCache.load(tmp_path / "acts.safetensors", model)
