"""Options of `generate` that act on scores, stopping, padding and caches: the tokens of transformers' own class."""

import copy
import threading

import pytest
import torch
from parity import tokens
from test_hf_generate import letters, shapes
from test_models import padded, saved

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM, GenerationConfig, WatermarkingConfig  # noqa: E402

import qwen3next.hf  # noqa: E402, F401

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def allowed(row, _text):
    """Other tokens for every row."""
    return [3 + row, 5, 7]


OPTIONS = {
    "constrained": {"prefix_allowed_tokens_fn": allowed},
    "constrained beams": {"prefix_allowed_tokens_fn": allowed, "num_beams": 2},
    "beams that end": {
        "num_beams": 3, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 2.0,
        "eos_token_id": [*range(3, 30)], "max_new_tokens": 12,
    },
    "rows that end": {"eos_token_id": [*range(3, 40)], "max_new_tokens": 12},
    "sampled beams": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    "repetition": {"no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.1, "remove_invalid_values": True},
    "truncation": {
        "do_sample": True, "min_p": 0.05, "typical_p": 0.9, "top_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3,
    },
    "renormalised": {"do_sample": True, "renormalize_logits": True, "top_k": 5},
    "bias": {"sequence_bias": [[[5], -10.0], [[7, 8], 3.0]]},
    "growing end": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5, "max_new_tokens": 12},
    "suppressed": {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [4, 5], "forced_eos_token_id": 7},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"), "do_sample": True},
    "time": {"max_time": 1000.0},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "static cache, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "hybrid cache": {"cache_implementation": "hybrid"},
    "a configuration": {"generation_config": GenerationConfig(max_new_tokens=5, num_beams=2, pad_token_id=0)},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def models(folder):
    """transformers', ours."""
    theirs = transformers.Qwen3NextForCausalLM.from_pretrained(folder).eval()
    return theirs, AutoModelForCausalLM.from_pretrained(folder)


def compared(models, run):
    """Raises: AssertionError if the two models give other tokens."""
    found = []
    for model in models:
        torch.manual_seed(0)
        found.append(run(model))
    assert torch.equal(*found)
    return found[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(models, name):
    ids, mask = padded("left")
    given = OPTIONS[name] if name == "a configuration" else GREEDY | OPTIONS[name]
    compared(models, lambda model: model.generate(ids, attention_mask=mask, **given))


def test_options_change_what_is_generated(models):
    """Else the comparison above would say nothing: an option that is lost leaves the tokens as they are."""
    ids, mask = padded("left")
    for name in ("constrained", "rows that end", "repetition", "bias", "suppressed", "guidance"):
        plain = models[1].generate(ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 12})
        found = models[1].generate(ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 12} | OPTIONS[name])
        assert plain.shape != found.shape or not torch.equal(plain, found), name


def test_lengths_and_missing_prompts(models):
    """A length in all, no prompt but the first token, a mask that is made from padding."""
    ids, mask = padded("left")
    longest = ids.shape[1] + 3
    options = {"do_sample": False, "pad_token_id": 0}
    assert compared(models, lambda m: m.generate(ids, attention_mask=mask, max_length=longest, **options)).shape[1] == (
        longest
    )
    assert compared(models, lambda m: m.generate(max_new_tokens=4, bos_token_id=1, **options)).shape == (1, 5)
    marked = ids.masked_fill(mask == 0, 0)
    compared(models, lambda m: m.generate(marked, max_new_tokens=4, **options))


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=lambda how: "-".join(how))
def test_from_embeddings(models, how):
    ids, mask = padded("left")
    compared(
        models,
        lambda m: m.generate(inputs_embeds=m.get_input_embeddings()(ids), attention_mask=mask, **GREEDY | how),
    )


@pytest.mark.parametrize("how", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_on_from_a_cache_of_padded_rows(models, how):
    """And what the cache holds has transformers' shapes, layer by layer."""
    ids, mask = padded("left")
    kept = []

    def run(model):
        first = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 3} | how
        )
        kept.append(first.past_key_values)
        wide = torch.nn.functional.pad(mask.repeat_interleave(how.get("num_beams", 1), 0), (0, 3), value=1)
        held = [
            shapes([x.keys, x.values] if hasattr(x, "keys") else [x.conv_states[0], x.recurrent_states[0]])
            for x in first.past_key_values.layers
        ]
        kept[-1] = held
        more = GREEDY | {"max_new_tokens": 3}
        return model.generate(first.sequences, attention_mask=wide, past_key_values=first.past_key_values, **more)

    compared(models, run)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16(models, how):
    """The logits of the first step; rounding may decide between two tokens after it.

    It may decide between two experts too, in few of the rows, so the rows' median error is compared.
    """
    ids, mask = padded("left", range(3, 20))
    found = []
    for model in models:
        model = copy.deepcopy(model).bfloat16() if how == "weights" else model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            out = model.generate(ids, attention_mask=mask, **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert out.sequences.shape == (len(ids), ids.shape[1] + 6)
        found.append(out.logits[0].float())
    exact = models[0](ids, attention_mask=mask).logits[:, -1]
    theirs, ours = ((x - exact).abs().amax(1).median() for x in found)
    assert ours <= 2 * theirs + 1e-3


def test_training_mode(models):
    ids, mask = padded("left")
    compared(models, lambda m: copy.deepcopy(m).train().generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "quantized"},
        {"cache_implementation": "nonsense"},
        {"nonsense": 3},
        {"token_healing": True},
        {"max_new_tokens": 0},
        {"num_return_sequences": 2},
    ],
    ids=lambda how: "-".join(map(str, how.items())),
)
def test_what_transformers_refuses_is_refused_alike(models, how):
    errors = []
    for model in models:
        with pytest.raises(ValueError, match=r"\w") as caught:  # compared below
            model.generate(tokens(9), **GREEDY | how)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_an_assistant_of_another_architecture(models):
    """And drafts for several rows are refused in transformers' words."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assistant, ids = transformers.LlamaForCausalLM(config).eval(), tokens(9, 1)
    greedy = models[1].generate(ids, **GREEDY | {"max_new_tokens": 12})
    assert torch.equal(models[1].generate(ids, **GREEDY | {"max_new_tokens": 12}, assistant_model=assistant), greedy)
    with pytest.raises(ValueError, match="batch_size = 1"):
        models[1].generate(tokens(9), **GREEDY, assistant_model=assistant)


def test_prompt_lookup_ends_at_an_end_of_text(models):
    """An end that a draft holds ends the text there."""
    ids = tokens(10, 1).repeat(1, 2)
    plain = models[1].generate(ids, **GREEDY | {"max_new_tokens": 20})
    end = plain[0, 30].item()
    options = GREEDY | {"max_new_tokens": 20, "eos_token_id": end}
    expected = models[0].generate(ids, **options)
    assert torch.equal(models[1].generate(ids, **options, prompt_lookup_num_tokens=4), expected)
    assert expected[0, -1] == end


def test_streamed_text(models):
    """A streamer that another thread reads."""
    tokenizer, ids = letters(), tokens(9, 1).clamp(min=1)  # 0 would be taken for padding
    options = GREEDY | {"bad_words_ids": [[94], [95], [96]]}
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=models[1].generate, args=(ids,), kwargs=options | {"streamer": streamer})
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert said == tokenizer.decode(models[0].generate(ids, **options)[0, 9:])
