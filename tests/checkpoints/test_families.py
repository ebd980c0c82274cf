"""Every family against its reference: logits, gradients, with and without cache, loading and saving, fp32.

Weights are random. The references are transformers' classes, and gated_qwen3.py for the models of the gated-attention
study. The tolerance is that of test_parity_transformers.py: 1e-5 on logits of order 1.
"""

import json
import warnings

import gated_qwen3
import pytest
import torch
from conftest import small_model
from parity import check_cached, check_left_padding, stored, tokens
from safetensors.torch import save_file

import qwen3next as q
from qwen3next.checkpoints.state_dict_adapter import to_released

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.03,
    "max_position_embeddings": 512,
}
HYBRID = TEXT | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
DENSE = HYBRID | {"intermediate_size": 96}
MOE = HYBRID | {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
}
TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
PLAIN = TEXT | {"intermediate_size": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}


def make(name, **changes):
    """A random transformers model with large enough weights, and the name prefix of its language model's tensors."""
    t = transformers
    torch.manual_seed(0)
    if name == "qwen3_5_text":
        model = t.Qwen3_5ForCausalLM(t.Qwen3_5TextConfig(**(DENSE | changes)))
    elif name == "qwen3_5":
        model = t.Qwen3_5ForConditionalGeneration(
            t.Qwen3_5Config(text_config=DENSE | changes, vision_config=TOWER, **changes)
        )
    elif name == "qwen3_5_moe_text":
        model = t.Qwen3_5MoeForCausalLM(t.Qwen3_5MoeTextConfig(**(MOE | changes)))
    elif name == "qwen3_5_moe":
        model = t.Qwen3_5MoeForConditionalGeneration(
            t.Qwen3_5MoeConfig(text_config=MOE | changes, vision_config=TOWER, **changes)
        )
    else:
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**(PLAIN | changes)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.get_input_embeddings().weight.normal_(0, 0.12)
        model.lm_head.weight.normal_(0, 0.12)
    return model.eval()


CASES = {
    "qwen3_5_text": ("qwen3_5_text", {}),
    "qwen3_5_text tied": ("qwen3_5_text", {"tie_word_embeddings": True}),
    "qwen3_5 nested, with a vision tower": ("qwen3_5", {}),
    "qwen3_5 nested, tied": ("qwen3_5", {"tie_word_embeddings": True}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {}),
    "qwen3_5_moe nested, with a vision tower": ("qwen3_5_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biased": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


def quietly_load(folder, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This checkpoint has")
        return q.load(folder, **options)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """The transformers model, and ours loaded from the folder that it saved."""
    name, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("theirs")
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model, quietly_load(folder), folder


@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 200])
def test_logits(pair, t):
    their, ours, _ = pair
    with torch.no_grad():
        expected, got = their(tokens(t)).logits, ours(tokens(t)).logits
    assert 0.3 < expected.std() < 3
    assert (got - expected).abs().max() <= 1e-5


def text_name(name):
    return name.replace("model.language_model.", "model.")


def test_every_gradient(pair):
    their, ours, _ = pair
    their.zero_grad()
    ours.zero_grad()
    ids = tokens(70)
    expected, got = their(ids, labels=ids).loss, ours.loss(ids).lm
    assert abs(expected.item() - got.item()) <= 1e-5
    expected.backward()
    got.backward()
    layout = q.Layout(**{**vars(q.Layout.released(ours.config)), "fused_experts": True})  # as transformers holds them
    ours_by_name = dict(to_released(ours.config, {n: p.grad for n, p in ours.named_parameters()}, layout))
    theirs_by_name = {text_name(n): p.grad for n, p in their.named_parameters() if ".visual." not in n}
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, grad in ours_by_name.items():
        assert (grad - theirs_by_name[name]).abs().max() <= 1e-5 * grad.abs().max().clamp(min=1), name


def test_cached(pair):
    check_cached(*pair[:2])


def test_left_padding(pair):
    check_left_padding(*pair[:2])


def test_greedy_continuation(pair):
    their, ours, _ = pair
    ids = tokens(9, b=1)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = their.generate(ids, max_new_tokens=12, **options)
    assert torch.equal(q.generate(ours, ids, max_new_tokens=12, stop_tokens=()), expected)


def test_what_we_save_opens_in_transformers_and_keeps_every_byte(pair, tmp_path):
    their, ours, folder = pair
    ours.save_pretrained(tmp_path / "a")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="float32").eval()
    assert type(again).__name__ == json.loads((tmp_path / "a" / "config.json").read_text())["architectures"][0]
    with torch.no_grad():
        assert torch.equal(again(tokens(30)).logits, their(tokens(30)).logits)
    quietly_load(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    original = {text_name(n): x for n, x in stored(folder).items() if ".visual." not in n}
    if ours.config.tie_word_embeddings:
        original.pop("lm_head.weight", None)
    for other in (b, original):
        assert a.keys() == other.keys()
        assert all(torch.equal(a[n].view(torch.uint8), other[n].view(torch.uint8)) for n in a)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_a_vision_tower_is_left_out_and_named(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"vision tower \(\d+ tensors, .* GiB\), which is left out"):
        model = q.load(tmp_path)
    assert model.config.wrapper_config == {}
    assert "vision_config" in q.ModelConfig.load(tmp_path).to_dict()


def test_config_keeps_what_it_was_given(pair):
    """Read, write and read again: the configuration is equal and no key is lost."""
    _, _, folder = pair
    values = json.loads((folder / "config.json").read_text())
    config = q.ModelConfig.from_dict(values)
    again = config.to_dict()
    assert q.ModelConfig.from_dict(json.loads(json.dumps(again))) == config
    assert not values.keys() - again.keys() - {"rope_parameters"}
    if "text_config" in values:
        lost = values["text_config"].keys() - again["text_config"].keys()
        assert again["vision_config"] == values["vision_config"]
        assert not lost


GATED = [
    {"gate": "headwise"},
    {"gate": "elementwise"},
    {"gate": "none"},
    {"gate": "headwise", "bias": True},
    {"gate": "elementwise", "qk_norm": False, "tied": True},
]


@pytest.fixture(scope="module", params=GATED, ids=str)
def study(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    c = gated_qwen3.config(**request.param)
    tensors = gated_qwen3.random_tensors(c)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return c, tensors, q.load(folder), folder


def test_study_logits_cached_and_gradients(study):
    c, tensors, model, _ = study
    ids = tokens(40)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    expected = gated_qwen3.logits(c, leaves, ids)
    got = model(ids).logits
    assert 0.3 < expected.std() < 3
    assert (got - expected).abs().max() <= 1e-5
    cache = model.new_cache(batch=2, max_len=40)
    with torch.no_grad():
        steps = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 30), (30, 31), (31, 40))]
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= 1e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) / expected.numel() ** 0.5
    (expected * weight).sum().backward()
    model.zero_grad()
    (got * weight).sum().backward()
    grads = dict(to_released(model.config, {n: p.grad for n, p in model.named_parameters()}))
    assert grads.keys() == leaves.keys()
    for name, grad in grads.items():
        assert (grad - leaves[name].grad).abs().max() <= 1e-5 * grad.abs().max().clamp(min=1), name


def test_study_round_trip(study, tmp_path):
    c, tensors, model, _ = study
    model.save_pretrained(tmp_path / "again")
    got = stored(tmp_path / "again")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in got)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    # transformers reads attention_bias and the study's code qkv_bias, so both are written.
    assert {key: written[key] for key in c} == c | {"attention_bias": c["qkv_bias"]}


def test_ungated_study_model_is_transformers_qwen3(tmp_path):
    """The reference against a third implementation, as far as both have the same features."""
    c = gated_qwen3.config("none")
    tensors = gated_qwen3.random_tensors(c)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(c))
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    with torch.no_grad():
        assert (their(tokens(30)).logits - gated_qwen3.logits(c, tensors, tokens(30))).abs().max() <= 1e-5


def released_form(folder, *, moe, tied, mtp_fused):
    """A folder in Qwen3.5's released layout: nested, with a vision tower, main experts fused, MTP's fused or single."""
    kind = "qwen3_5_moe" if moe else "qwen3_5"
    changes = {"model_type": f"{kind}_text", "tie_word_embeddings": tied, "initializer_range": 0.02}
    changes |= {} if moe else {"num_experts": 0}
    model = small_model(**changes)
    layout = q.Layout(
        prefix="model.language_model.", flat_projections=True, fused_experts=True, fused_mtp_experts=mtp_fused
    )
    tensors = {n: x.detach().clone() for n, x in to_released(model.config, dict(model.named_parameters()), layout)}
    tensors["model.visual.patch_embed.proj.weight"] = torch.zeros(8, 3, 2, 4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.to_dict()
    for key in ("architectures", "router_aux_loss_coef") + (("intermediate_size",) if moe else ()):
        text.pop(key, None)
    text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    text |= {
        "model_type": f"{kind}_text",
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "mlp_only_layers": [],
        "use_cache": True,
        "dtype": "float32",
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration" if moe else "Qwen3_5ForConditionalGeneration"],
        "image_token_id": 90,
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "unsloth_fixed_mtp": True,
        "video_token_id": 91,
        "vision_config": TOWER | {"model_type": kind},
        "vision_end_token_id": 92,
        "vision_start_token_id": 93,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mtp_fused", [False, True])
def test_the_released_form_opens_here_and_there(tmp_path, moe, tied, mtp_fused):
    model = released_form(tmp_path, moe=moe, tied=tied, mtp_fused=mtp_fused)
    with pytest.warns(UserWarning, match=r"vision tower \(1 tensors") as warned:
        ours = q.load(tmp_path)
    assert len(warned) == 1  # no warning about MTP, which is present
    for (name, a), b in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert name == b[0]
        assert torch.equal(a, b[1]), name
    assert ours.layout.fused_mtp_experts == (mtp_fused and moe)
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    with torch.no_grad():
        assert (their(tokens(40)).logits - ours(tokens(40)).logits).abs().max() <= 1e-5
    whole = q.ModelConfig.load(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    again = whole.to_dict()
    for key in told.keys() - {"text_config"}:
        assert again[key] == told[key], key
    for key in told["text_config"]:
        assert again["text_config"][key] == told["text_config"][key], key
    ours.save_pretrained(tmp_path / "saved")
    assert q.load(tmp_path / "saved").config == ours.config.replace(extra=q.load(tmp_path / "saved").config.extra)
