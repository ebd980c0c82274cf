"""`generate` of the classes of qwen3next/hf.py: every way of decoding, its outputs, its caches, and what is refused.

What transformers' own class can do is compared with it; the rest with greedy decoding or plain sampling.
"""

import pytest
import torch
from parity import tokens
from test_models import padded, saved

import qwen3next as q

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

import qwen3next.hf as hf  # noqa: E402

EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}
LISTS = ("scores", "logits", "hidden_states", "attentions")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SAMPLED = {"max_new_tokens": 16, "do_sample": True, "temperature": 0.7, "top_k": 40}
DRAFTS = {"lookup": {"prompt_lookup_num_tokens": 3}, "mtp": {"use_mtp": True, "num_assistant_tokens": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), mtp=1)


@pytest.fixture(scope="module")
def their(folder):
    return transformers.Qwen3NextForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def our(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def repeated():
    """A prompt in which lookup finds something."""
    return tokens(10, 1).repeat(1, 2)


def shapes(x):
    return tuple(x.shape) if isinstance(x, torch.Tensor) else [shapes(part) for part in x]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"bad_words_ids": [[5], [7, 8]], "repetition_penalty": 1.2, "min_new_tokens": 4},
    ],
    ids=lambda how: "-".join(how) or "greedy",
)
def test_outputs_are_transformers(their, our, how):
    """Tokens; scores, logits, hidden states and attentions of every step, in shape and value."""
    ids, mask = padded("left")
    found = []
    for model in (their, our):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=mask, **GREEDY | EVERYTHING | how))
    expected, got = found
    assert torch.equal(got.sequences, expected.sequences)
    for name in LISTS:
        assert shapes(got[name]) == shapes(expected[name]), name
    for a, b in zip(got.scores, expected.scores, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        assert (a - b)[finite].abs().max() <= 5e-5
    beams = getattr(expected, "beam_indices", None)
    sums = [
        model.compute_transition_scores(x.sequences, x.scores, beams) for model, x in ((their, expected), (our, got))
    ]
    assert torch.allclose(*sums, atol=1e-4)
    if beams is not None:
        assert torch.equal(got.beam_indices, beams)
        assert (got.sequences_scores - expected.sequences_scores).abs().max() <= 1e-4


@pytest.mark.parametrize("how", ["assisted", "lookup", "mtp"])
def test_outputs_of_drafted_runs_are_those_of_greedy_decoding(our, how):
    draft = {"assistant_model": our, "num_assistant_tokens": 2} if how == "assisted" else DRAFTS[how]
    ids = repeated()
    expected = our.generate(ids, **GREEDY | EVERYTHING)
    got = our.generate(ids, **GREEDY | EVERYTHING, **draft)
    assert torch.equal(got.sequences, expected.sequences)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == ids.shape[1] + 5
    for name in ("scores", "logits"):
        assert shapes(got[name]) == shapes(expected[name])
        assert all((a - b).abs().max() <= 1e-4 for a, b in zip(got[name], expected[name], strict=True))
    for name in ("hidden_states", "attentions"):
        for i, (a, b) in enumerate(zip(got[name], expected[name], strict=True)):
            for mine, plain in zip(a, b, strict=True):
                assert mine.shape == plain.shape
                # Drafts in the first round: transformers gives another token's there, of its own classes too.
                assert (how != "mtp" and i == 1) or (mine - plain).abs().max() <= 1e-4


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_drafts_leave_the_sampled_tokens_of_a_seed_as_they_are(our, drafts, seed):
    """And torch's generator stands where it stood without drafts."""
    found = []
    for how in ({}, DRAFTS[drafts]):
        torch.manual_seed(seed)
        out = our.generate(repeated(), **SAMPLED, **how, return_dict_in_generate=True, output_scores=True)
        found.append((out.sequences, torch.rand(()), out.scores))
    (plain, after, scores), (drafted, also_after, drafted_scores) = found
    assert torch.equal(plain, drafted)
    assert after == also_after
    assert len(scores) == len(drafted_scores) == 16
    for a, b in zip(scores, drafted_scores, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert (a - b)[a.isfinite()].abs().max() <= 1e-4


def test_the_mtp_layer_drafts_what_the_core_drafts(our, monkeypatch):
    """The tokens of `q.generate`, and drafts that are accepted as often: `draft_tokens` gets the same calls."""
    ids, calls, draft_tokens = tokens(9, 1), [], our.core.draft_tokens

    def noted(cache, token, count):
        drafts = draft_tokens(cache, token, count)
        calls.append((cache.lengths, token.tolist(), drafts.tolist()))
        return drafts

    monkeypatch.setattr(our.core, "draft_tokens", noted)
    text = our.generate(ids, max_new_tokens=24, do_sample=False, use_mtp=True, num_assistant_tokens=2)
    mine = calls.copy()
    calls.clear()
    expected = q.generate(our.core, ids, max_new_tokens=24, draft_tokens=2, drafts="mtp", stop_tokens=())
    assert torch.equal(text, expected)
    assert len(mine) >= 8
    assert mine == calls


@pytest.mark.parametrize("padding", ["left", "right"])
def test_mtp_drafts_behind_padding(our, padding):
    ids = tokens(14, 1)
    mask = torch.ones_like(ids)
    mask[:, slice(0, 4) if padding == "left" else slice(-4, None)] = 0
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": 16}
    assert torch.equal(our.generate(ids, **options, use_mtp=True), our.generate(ids, **options))


def test_mtp_drafts_of_a_length_that_is_chosen_by_measuring(our):
    options = GREEDY | {"max_new_tokens": 30}
    assert torch.equal(our.generate(tokens(9, 1), **options, use_mtp=True), our.generate(tokens(9, 1), **options))


def test_mtp_drafts_end_at_an_end_of_text(our):
    plain = our.generate(tokens(9, 1), **GREEDY | {"max_new_tokens": 20})
    end = plain[0, 15].item()
    first = plain[0, 9:].tolist().index(end)
    options = GREEDY | {"max_new_tokens": 20, "eos_token_id": end}
    assert torch.equal(our.generate(tokens(9, 1), **options, use_mtp=True), plain[:, : 9 + first + 1])


def test_a_conversation_with_mtp_drafts_goes_on_in_its_cache(our):
    ids = tokens(9, 1)
    whole = our.generate(ids, **GREEDY | {"max_new_tokens": 20})
    first = our.generate(ids, **GREEDY, use_mtp=True, return_dict_in_generate=True)
    assert torch.equal(first.sequences, whole[:, :15])
    more = our.generate(
        first.sequences, past_key_values=first.past_key_values, **GREEDY | {"max_new_tokens": 14}, use_mtp=True
    )
    assert torch.equal(more, whole)
    # Several new tokens behind a cache run before anything is drafted.
    longer = torch.cat((whole, tokens(5, 1)), dim=1)
    again = our.generate(ids, **GREEDY, use_mtp=True, return_dict_in_generate=True).past_key_values
    got = our.generate(longer, past_key_values=again, **GREEDY, use_mtp=True)
    assert torch.equal(got, our.generate(longer, **GREEDY))


def test_what_mtp_drafts_need_is_said(our, folder, tmp_path):
    ids = tokens(9, 1)
    plain = our.generate(ids, **GREEDY, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="without use_mtp=True"):
        our.generate(plain.sequences, past_key_values=plain.past_key_values, **GREEDY, use_mtp=True)
    with pytest.raises(ValueError, match="num_assistant_tokens must be at least 1"):
        our.generate(ids, **GREEDY, use_mtp=True, num_assistant_tokens=0)
    without = AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    with pytest.raises(ValueError, match="has no MTP layer"):
        without.generate(ids, **GREEDY, use_mtp=True)


def test_assisted_sampling_with_the_model_itself_accepts_every_draft(our):
    """The assistant's probabilities are the model's, so a draft is refused by rounding alone."""
    torch.manual_seed(0)
    options = SAMPLED | {"assistant_model": our, "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
    out = our.generate(tokens(9, 1), **options, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape == (1, 25)
    chosen = torch.stack(out.scores, dim=1)[0].gather(1, out.sequences[0, 9:, None])
    assert chosen.isfinite().all()


def test_static_cache_holds_what_transformers_holds(folder, our):
    ids = tokens(9)
    found = []
    for model in (transformers.Qwen3NextForCausalLM.from_pretrained(folder), our):
        options = GREEDY | {"attention_mask": torch.ones_like(ids), "cache_implementation": "static"}
        out = model.generate(ids, **options, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, StaticCache)
        found.append(out)
    expected, got = found
    assert torch.equal(got.sequences, expected.sequences)
    assert got.past_key_values.get_seq_length() == 14
    for mine, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert type(mine) is type(other)
        if hasattr(other, "keys"):
            assert mine.keys.shape == other.keys.shape
            assert (mine.keys - other.keys).abs().max() <= 1e-4
        else:
            assert (mine.recurrent_states[0] - other.recurrent_states[0]).abs().max() <= 1e-4


@pytest.mark.parametrize(("cache", "padding"), [("dynamic", "left"), ("static", "none")])
def test_from_embeddings_then_on_from_embeddings(our, cache, padding):
    """With ids, without, and continued behind the cache that a run from embeddings left."""
    ids, mask = padded("left") if padding == "left" else (tokens(9), torch.ones(2, 9, dtype=torch.long))
    embed = our.get_input_embeddings()
    whole = our.generate(ids, attention_mask=mask, **GREEDY)
    embeds = embed(ids).detach()
    made = {"cache_implementation": cache, "attention_mask": mask, "return_dict_in_generate": True}
    assert torch.equal(our.generate(ids, inputs_embeds=embeds, **GREEDY, **made).sequences, whole)
    n = ids.shape[1]
    first = our.generate(inputs_embeds=embeds, **made, **GREEDY | {"max_new_tokens": 3})
    assert torch.equal(first.sequences, whole[:, n : n + 3])
    longer = torch.cat((embeds, embed(first.sequences).detach()), dim=1)
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    more = our.generate(
        inputs_embeds=longer,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        **GREEDY | {"max_new_tokens": 3},
    )
    assert torch.equal(more, whole[:, n + 3 :])
    assert not torch.equal(
        our.generate(inputs_embeds=embeds.flip(1), attention_mask=mask[:, :n], **GREEDY | {"max_new_tokens": 3}),
        first.sequences,
    )


def test_on_from_the_cache_of_several_sampled_texts(our):
    torch.manual_seed(0)
    begun = our.generate(
        tokens(9), **GREEDY | {"do_sample": True}, num_return_sequences=2, return_dict_in_generate=True
    )
    more = our.generate(begun.sequences, past_key_values=begun.past_key_values, **GREEDY)
    assert torch.equal(more, our.generate(begun.sequences, **GREEDY))


@pytest.mark.parametrize("padding", ["none", "left"])
def test_positions_may_be_given(their, our, padding):
    ids, mask = padded("left") if padding == "left" else (tokens(9), torch.ones(2, 9, dtype=torch.long))
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    options = GREEDY | {"attention_mask": mask}
    assert torch.equal(our.generate(ids, **options, position_ids=positions), our.generate(ids, **options))
    with torch.no_grad():
        plain = our(ids, attention_mask=mask).logits[:, -1]
        wide = torch.cat((torch.zeros(len(ids), 32, dtype=torch.long), ids), dim=1)
        mask = torch.nn.functional.pad(mask, (32, 0))
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        assert (our(wide, attention_mask=mask, position_ids=positions).logits[:, -1] - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("keep", [0, 4])
def test_logits_to_keep_changes_no_token(our, keep):
    ids = repeated()
    plain = our.generate(ids, **GREEDY)
    assert torch.equal(our.generate(ids, **GREEDY, logits_to_keep=keep), plain)
    draft = {"assistant_model": our, "num_assistant_tokens": 2}
    assert torch.equal(our.generate(ids, **GREEDY, **draft, logits_to_keep=keep), plain)


def test_eager_attention(folder, their):
    """The other tests run "sdpa"."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids, mask = padded("left")
    expected = their.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_flex_attention_is_refused_as_transformers_refuses_it(folder):
    for kind in (transformers.Qwen3NextForCausalLM, hf.Qwen3NextForCausalLM):
        with pytest.raises((ValueError, ImportError), match=r"(?i)flex"):
            kind.from_pretrained(folder, attn_implementation="flex_attention")


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 2, "force_words_ids": [[5]]},
    ],
    ids=["group beams", "contrastive", "dola", "constrained"],
)
def test_what_transformers_no_longer_has_is_refused_alike(their, our, how):
    """These need code from the hub, which is not run unless it is asked for."""
    errors = []
    for model in (their, our):
        with pytest.raises((ValueError, OSError), match="trust_remote_code") as caught:
            model.generate(tokens(9), **GREEDY | how)
        errors.append((caught.type, str(caught.value)[:80]))
    assert errors[0] == errors[1]


def test_caches_of_other_kinds_are_refused(our):
    """An offloaded cache would not be offloaded; keys and values in int8 are `q.generate`'s."""
    ids = tokens(9)
    offloaded = DynamicCache(config=our.config, offloading=True)

    class Another(DynamicCache):
        pass

    for cache in (offloaded, Another(config=our.config)):
        with pytest.raises(ValueError, match="pass a DynamicCache or StaticCache"):
            our(ids, past_key_values=cache)
    for name in ("offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match="pass a DynamicCache or StaticCache"):
            our.generate(ids, **GREEDY, cache_implementation=name)


def test_quantised_caches_are_refused(our, monkeypatch):
    """transformers makes one where its packages are installed; a stand-in takes its place here."""

    class QuantizedCache(DynamicCache):
        def __init__(self, backend, config):
            super().__init__(config=config)

    monkeypatch.setattr(transformers.generation.utils, "QuantizedCache", QuantizedCache)
    with pytest.raises(ValueError, match="in a QuantizedCache"):
        our.generate(tokens(9), **GREEDY, cache_implementation="quantized")


def letters():
    """A tokenizer whose first 97 tokens are characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:97]
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def test_stop_strings_criteria_processors_and_streamers(our):
    tokenizer = letters()
    ids = tokens(9, 1)
    plain = our.generate(ids, **GREEDY, bad_words_ids=[[94], [95], [96]])
    stop = tokenizer.decode(plain[0, 12:14])
    end = tokenizer.decode(plain[0, 9:]).index(stop) + 2
    got = our.generate(ids, **GREEDY, bad_words_ids=[[94], [95], [96]], stop_strings=[stop], tokenizer=tokenizer)
    assert got.shape[1] == 9 + end

    class Streamer(transformers.generation.BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    for how in ({}, DRAFTS["mtp"], DRAFTS["lookup"]):
        streamer = Streamer()
        out = our.generate(ids, **GREEDY, **how, streamer=streamer)
        assert streamer.seen == out[0].tolist()
        assert streamer.ended
    lengths = transformers.StoppingCriteriaList(
        [lambda text, _scores, **_: torch.full((len(text),), text.shape[1] >= 12)]
    )
    assert our.generate(ids, **GREEDY, stopping_criteria=lengths).shape[1] == 12
    only = transformers.LogitsProcessorList([lambda _ids, scores: scores.index_fill(1, torch.tensor([42]), 1e4)])
    assert (our.generate(ids, **GREEDY, logits_processor=only)[0, 9:] == 42).all()


def test_classes_say_that_they_generate():
    for model in (hf.Qwen3NextForCausalLM, hf.Qwen3_5ForCausalLM, hf.Qwen3_5MoeForCausalLM, hf.Qwen3ForCausalLM):
        assert transformers.GenerationMixin in model.__bases__
        assert model.can_generate()


def test_steps_of_several_tokens_run_compiled_code(our, monkeypatch):
    """What assisted decoding checks at once, where compiled code can run; else the modules give the same."""
    ids = tokens(9, 1)
    calls, step_all = [], our.core.step_all
    monkeypatch.setattr(our.core, "step_all", lambda ids, cache: calls.append(ids.shape[1]) or step_all(ids, cache))
    with torch.no_grad():
        cache = our(ids).past_key_values
        got = our(ids[:, :3], past_key_values=cache).logits
        assert calls == ([3] if {row.operation: row.runs for row in q.explain(our.core)}["decode"] == "cpp" else [])
        our(ids[:, :3], past_key_values=cache, logits_to_keep=1)  # as a prefill in chunks
        whole = our(torch.cat((ids, ids[:, :3]), dim=1)).logits[:, -3:]
    assert (got - whole).abs().max() <= 2e-5
    assert len(calls) <= 1
    assert cache.get_seq_length() == 15
