"""The classes of qwen3next/hf.py against transformers' own, on the same weights and the same inputs.

Tolerances: logits are of order 1 and differ by 3e-6 to 2e-5 (docs/numerics.md); tokens of greedy decoding are equal.
"""

import pytest
import torch
from conftest import small_config, small_model
from parity import stored, tokens

import qwen3next as q
from qwen3next.checkpoints.state_dict_adapter import Layout, to_released

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModel, AutoModelForCausalLM, DynamicCache  # noqa: E402

import qwen3next.hf as hf  # noqa: E402

FAMILIES = {
    "qwen3_next": (transformers.Qwen3NextForCausalLM, {}),
    "qwen3_5_text": (transformers.Qwen3_5ForCausalLM, {"num_experts": 0}),
    "qwen3_5_moe_text": (transformers.Qwen3_5MoeForCausalLM, {}),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        {"num_experts": 0, "full_attention_interval": 1, "attention_gate": "none", "zero_centred_norms": False}
        | {"partial_rotary_factor": 1.0},
    ),
}
KINDS = ["hidden_states", "attentions", "router_logits"]


def saved(folder, family="qwen3_next", mtp=0, **changes):
    """A folder in the released layout, with random weights."""
    changes = FAMILIES[family][1] | changes
    model = small_model(model_type=family, mtp_num_hidden_layers=mtp, initializer_range=0.03, **changes)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def their(folder):
    return transformers.Qwen3NextForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def our(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def padded(side, lengths=(11, 5, 8)):
    """Prompts of these lengths, padded on one side, and their mask."""
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
    for row, n in enumerate(lengths):
        columns = slice(max(lengths) - n, None) if side == "left" else slice(0, n)
        ids[row, columns], mask[row, columns] = tokens(n, 1)[0] + 0, 1
    return ids, mask.long()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_classes_give_this_model_and_its_logits_are_transformers(tmp_path, family):
    theirs = FAMILIES[family][0].from_pretrained(saved(tmp_path, family)).eval()
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(ours, hf.CausalLM)
    assert type(ours).__name__ == type(theirs).__name__
    assert not any(report.values())
    ids = tokens(70)
    with torch.no_grad():
        expected, got = theirs(ids, labels=ids), ours(ids, labels=ids)
        assert (got.logits - expected.logits).abs().max() <= 3e-5
        assert (got.loss - expected.loss).abs() <= 1e-5
        backbone = AutoModel.from_pretrained(tmp_path)
        assert isinstance(backbone, hf.Backbone)
        hidden = ours.model(ids).last_hidden_state
        assert torch.equal(backbone(ids).last_hidden_state, hidden)
        assert (hidden - theirs.model(ids).last_hidden_state).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_has_the_same_keys_and_bytes(tmp_path, family):
    mtp = 0 if family == "qwen3" else 1
    saved(tmp_path / "a", family, mtp)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert (model.mtp is not None) == bool(mtp)
    model.save_pretrained(tmp_path / "b", max_shard_size="200KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")  # from several files
    again.save_pretrained(tmp_path / "c")
    before = stored(tmp_path / "a")
    for folder in ("b", "c"):
        after = stored(tmp_path / folder)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())
    ids = tokens(9)
    assert torch.equal(q.load(tmp_path / "c")(ids).logits, q.load(tmp_path / "a")(ids).logits)


def test_names_of_these_classes_are_read_too(tmp_path, our):
    our.save_pretrained(tmp_path, save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), our.parameters(), strict=True))


def test_fp8_folders_are_read_by_our_reader(tmp_path):
    from test_convert import quantise

    quantise(saved(tmp_path, mtp=1))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids = tokens(9)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, q.load(tmp_path, dtype="float32")(ids).logits)
    assert ours.generate(ids, max_new_tokens=3).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(tokens(5)).logits.dtype == dtype


@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_of_padded_rows(their, our, side):
    ids, mask = padded(side)
    their.set_attn_implementation("eager")
    flags = {f"output_{kind}": True for kind in KINDS}
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : ids.shape[1] - 4] = -100
    real = mask.bool()
    with torch.no_grad():
        expected, got = (m(ids, attention_mask=mask, labels=labels, **flags) for m in (their, our))
    assert (got.logits - expected.logits)[real].abs().max() <= 2e-5
    assert (got.aux_loss - expected.aux_loss).abs() <= 1e-5
    if side == "right":
        assert (got.loss - expected.loss).abs() <= 1e-5
    for kind in KINDS:
        assert len(got[kind]) == len(expected[kind])
        for a, b in zip(got[kind], expected[kind], strict=True):
            assert a.shape == b.shape
            if kind == "attentions":
                a, b = (x.transpose(1, 2)[real] for x in (a, b))
            elif kind == "router_logits":
                a, b = (x[real.flatten()] for x in (a, b))
            else:
                a, b = a[real], b[real]
            assert (a - b).abs().max() <= 5e-5, kind


def test_outputs_of_cached_steps_are_in_columns(their, our):
    """A prompt that begins with padding, two more tokens, then one: attention's last axis counts padding too."""
    ids, mask = padded("left")
    more = tokens(3, 3)
    their.set_attn_implementation("eager")
    theirs, ours = (DynamicCache(config=m.config) for m in (their, our))
    ids = torch.cat((ids, more), dim=1)
    mask = torch.cat((mask, torch.ones(3, 3, dtype=torch.long)), dim=1)
    flags = {"output_hidden_states": True, "output_attentions": True}
    for begin, end in ((0, 11), (11, 13), (13, 14)):
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
        options = {"attention_mask": mask[:, :end], "position_ids": positions, **flags}
        with torch.no_grad():
            expected = their(ids[:, begin:end], past_key_values=theirs, **options)
            got = our(ids[:, begin:end], past_key_values=ours, **options)
        real = mask[:, begin:end].bool()
        assert got.past_key_values is ours
        assert ours.get_seq_length() == theirs.get_seq_length() == end
        assert (got.logits - expected.logits)[real].abs().max() <= 2e-5
        assert (got.attentions[0] - expected.attentions[0]).transpose(1, 2)[real].abs().max() <= 1e-5
        assert (got.hidden_states[2] - expected.hidden_states[2])[real].abs().max() <= 5e-5
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(other)
    assert (ours.layers[0].recurrent_states[0] - theirs.layers[0].recurrent_states[0]).abs().max() <= 1e-4
    keys, values = ours.layers[3].keys, theirs.layers[3].keys
    assert (keys - values)[mask.bool()[:, None].expand(-1, 2, -1)].abs().max() <= 1e-4


GENERATE = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "penalty": {"repetition_penalty": 1.3},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate(their, our, how, padding):
    ids, mask = padded("left") if padding == "left" else (tokens(9), torch.ones(2, 9, dtype=torch.long))
    found = []
    for model in (their, our):
        torch.manual_seed(0)
        options = {"max_new_tokens": 9, "pad_token_id": 0, "do_sample": False} | GENERATE[how]
        found.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*found)


def test_right_padded_rows_continue_as_if_alone(our):
    ids, mask = padded("right")
    together = our.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, n in enumerate(mask.sum(1).tolist()):
        alone = our.generate(ids[row : row + 1, :n], max_new_tokens=6, do_sample=False)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, n:])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("how", ["assisted", "by another model", "prompt lookup"])
def test_drafted_tokens_leave_the_result_as_it_is(our, how, padding):
    """transformers refuses these for its own class, whose recurrent states cannot be taken back."""
    ids = tokens(20, 1)
    draft = {"assistant_model": our, "num_assistant_tokens": 4}
    if how == "by another model":
        draft["assistant_model"] = hf.Qwen3NextForCausalLM._from_config(our.config)
    elif how == "prompt lookup":
        ids, draft = ids.repeat(1, 2), {"prompt_lookup_num_tokens": 3}
    mask = torch.ones_like(ids)
    mask[:, {"none": slice(0), "left": slice(0, 3), "right": slice(-3, None)}[padding]] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    greedy = our.generate(ids, **options)
    assert torch.equal(our.generate(ids, **options, **draft), greedy)
    alone = our.generate(ids[mask.bool()][None], max_new_tokens=16, do_sample=False)
    assert torch.equal(greedy[:, ids.shape[1] :], alone[:, -16:])


def test_the_core_drafts_with_the_mtp_layer(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, mtp=1))
    ids = tokens(9, 1)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(q.generate(model.core, ids, max_new_tokens=12, draft_tokens=2, drafts="mtp"), greedy)
    assert not any(p.requires_grad for p in model.mtp.parameters())


def test_generate_from_embeddings_and_from_a_cache(our):
    ids = tokens(8)
    embeds = our.get_input_embeddings()(ids).detach()
    whole = our.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    from_embeds = our.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(from_embeds, whole.sequences[:, 8:])
    first = our.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = our.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert torch.equal(more, whole.sequences)


def test_a_cache_can_be_cropped_selected_and_repeated(our):
    ids = tokens(9)
    cache = DynamicCache(config=our.config)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = our(ids[:, :6]).logits[:, -1]
        our(ids, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 5
        assert (our(ids[:, 5:6], past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-5
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0]))
        swapped = our(ids[:, 6:7].flip(0), past_key_values=cache).logits[:, -1]
        assert (swapped.flip(0) - our(ids[:, :7]).logits[:, -1]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="negative"):
        cache.crop(2)


def test_a_first_call_with_gradients_enters_the_cache_later(our):
    ids = tokens(9)
    out = our(ids[:, :6])
    out.logits.sum().backward()
    assert all(p.grad is not None for p in our.parameters())
    with torch.no_grad():
        continued = our(ids[:, 6:], past_key_values=out.past_key_values).logits
        assert (continued - our(ids).logits[:, 6:]).abs().max() <= 1e-5


def test_gradients_are_transformers_with_and_without_checkpointing(their, our):
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    options = {"attention_mask": mask, "labels": labels, "output_router_logits": True}
    found = []
    for reentrant in (None, False, True):
        our.zero_grad()
        if reentrant is not None:
            our.gradient_checkpointing_enable({"use_reentrant": reentrant})
        our.train()
        our(ids, **options).loss.backward()
        found.append({name: p.grad.clone() for name, p in our.named_parameters()})
    # Within rounding: a checkpointed block first runs without gradients, and "auto" may pick other kernels for that.
    for other in found[1:]:
        for name, g in found[0].items():
            assert (other[name] - g).abs().max() <= 1e-5 * g.abs().max(), name
    their.zero_grad()
    their(ids, **options).loss.backward()
    config = our.core.config
    layout = Layout(**{**vars(Layout.released(config)), "fused_experts": True})  # as transformers' class has them
    mine = {name.removeprefix("model.").replace("layers.", "blocks."): g for name, g in found[0].items()}
    released = dict(to_released(config, mine, layout))
    theirs = {name: p.grad for name, p in their.named_parameters()}
    assert theirs.keys() == released.keys()
    for name, g in theirs.items():
        assert (released[name] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-7, name


def test_packed_rows_are_separate_sequences(our):
    """position_ids that begin again, as TRL packs, without a mask."""
    a, b = tokens(7, 1), tokens(5, 1)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    with torch.no_grad():
        packed = our(torch.cat((a, b), dim=1), position_ids=positions, use_cache=False).logits
        apart = torch.cat((our(a).logits, our(b).logits), dim=1)
    assert (packed - apart).abs().max() <= 1e-5


def test_labels_are_counted_as_the_trainer_asks(their, our):
    ids = tokens(12)
    for items in (None, 50, torch.tensor(50)):
        with torch.no_grad():
            a, b = (m(ids, labels=ids, num_items_in_batch=items).loss for m in (their, our))
        assert (a - b).abs() <= 1e-5


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(our, keep):
    ids = tokens(6)
    with torch.no_grad():
        whole = our(ids).logits
        chosen = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        assert (our(ids, logits_to_keep=keep).logits - chosen).abs().max() <= 5e-6


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_be_resized(tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "m", tie_word_embeddings=tied))
    ids = tokens(6)
    before = model(ids).logits
    model.resize_token_embeddings(103, mean_resizing=False)
    after = model(ids).logits
    assert after.shape[-1] == 103
    assert (after[..., :97] - before).abs().max() <= 1e-6
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model(torch.full((1, 2), 102))
    assert model.generate(ids, max_new_tokens=3).shape == (2, 9)
    model.save_pretrained(tmp_path / "n")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "n").config.vocab_size == 103


def test_a_step_runs_compiled_code_where_it_can(our):
    """The blocks have another class here, which the compiled step must know."""
    ids = tokens(5, 1)
    with torch.no_grad():
        cache = our(ids).past_key_values
        expected = our(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1]
        assert (our(ids[:, :1], past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-5
    assert {row.operation: row.runs for row in q.explain(our.core)}["decode"] == "cpp"


def test_hooks_and_changed_modules_act(our):
    ids = tokens(5, 1)
    with torch.no_grad():
        before = our(ids).logits
        with our.core.hooks([("blocks.1.hook_attn_out", lambda x, hook: x * 0)]):
            assert not torch.equal(our(ids).logits, before)
        our.set_input_embeddings(torch.nn.Embedding.from_pretrained(our.get_input_embeddings().weight.flip(0)))
        assert torch.allclose(our(96 - ids).logits, before)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask must have shape"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask must have shape"),
        ({"position_ids": torch.tensor([[0, 1, 5, 6, 7]])}, "position_ids must count up by one"),
        ({"inputs_embeds": torch.ones(2, 5, 64)}, "either input_ids or inputs_embeds"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(our, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        our(tokens(5), **call)


def test_a_cache_of_another_model_is_refused(their, our):
    with torch.no_grad():
        cache = their(tokens(5), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="filled by another model"):
            our(tokens(5), past_key_values=cache)


def test_the_config_is_ours(our):
    assert our.core.config.replace(extra={}) == small_config(
        mtp_num_hidden_layers=0, initializer_range=0.03, router_aux_loss_coef=our.config.router_aux_loss_coef
    ).replace(extra={})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rope_types_of_transformers(folder, kind):
    """On 40 tokens behind a trained length of 16."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    changes = {"rope_parameters": rope, "max_position_embeddings": 64 if kind == "yarn" else 16}
    theirs = transformers.Qwen3NextForCausalLM.from_pretrained(folder, **changes)
    ours = AutoModelForCausalLM.from_pretrained(folder, **changes)
    ids = tokens(40)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 3e-5
    found = [m.generate(ids[:, :12], max_new_tokens=8, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_transformers_functions_for_experts(our, name):
    ids = tokens(9)
    with torch.no_grad():
        before = our(ids).logits
        our.set_experts_implementation(name)
        assert (our(ids).logits - before).abs().max() <= 1e-5
        assert our.core.decode_backend == "torch"


def test_models_with_a_vision_tower_stay_transformers_own():
    """They make their language model by AutoModel.from_config, and need its positions and parameter names."""
    text = transformers.Qwen3_5TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    made = transformers.AutoModel.from_config(text)
    assert type(made).__module__.startswith("transformers.")
    assert type(made).__name__ == "Qwen3_5TextModel"
