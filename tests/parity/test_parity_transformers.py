"""Logits, loss and every gradient against transformers' Qwen3NextForCausalLM, in fp32, on random weights.

Tolerance: 1e-5 absolute on logits of order 1. The largest measured difference is 3e-6, and an increase of a single
weight matrix by one per cent changes logits by 5e-3 or more. Random models with a much larger initializer_range amplify
rounding: at 0.2 transformers differs from fp64 by 1e-3. docs/numerics.md has the figures.
"""

import pytest
import torch
from conftest import small_config
from parity import check_cached, check_left_padding, tokens

import qwen3next as q
from qwen3next.checkpoints.state_dict_adapter import to_released

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers")

CASES = {
    "as released": {},
    "dense layers": {"mlp_only_layers": (1, 2)},
    "every second layer sparse": {"decoder_sparse_step": 2},
    "no experts": {"num_experts": 0, "num_experts_per_tok": 1},
    "interval 2": {"full_attention_interval": 2},
    "own layer types": {"layer_types": ("full_attention", "linear_attention", "linear_attention", "full_attention")},
    "equal heads": {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "num_key_value_heads": 4},
    "one key head": {"linear_num_key_heads": 1, "linear_num_value_heads": 6, "num_key_value_heads": 1},
    "tied, full rotation, no renormalisation": {
        "tie_word_embeddings": True,
        "partial_rotary_factor": 1.0,
        "norm_topk_prob": False,
    },
    "two taps": {"linear_conv_kernel_dim": 2},
}


def theirs(**changes):
    config = small_config(mtp_num_hidden_layers=0, initializer_range=0.03, **changes)
    values = {k: v for k, v in config.to_dict().items() if k != "mtp_num_hidden_layers"}
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.lm_head.weight.normal_(0, 0.12)
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """The transformers model, and ours loaded from the folder that it saved."""
    folder = tmp_path_factory.mktemp("theirs")
    model = theirs(**CASES[request.param])
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match="no MTP"):
        ours = q.load(folder)
    return model, ours


@pytest.mark.parametrize("t", [1, 2, 5, 63, 64, 65, 129, 300])
def test_logits(pair, t):
    their, ours = pair
    with torch.no_grad():
        expected, got = their(tokens(t)).logits, ours(tokens(t)).logits
    assert 0.3 < expected.std() < 3
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("t", [2, 65, 140])
def test_loss_and_every_gradient(pair, t):
    their, ours = pair
    their.zero_grad()
    ours.zero_grad()
    expected, got = their(tokens(t), labels=tokens(t)).loss, ours.loss(tokens(t)).lm
    assert abs(expected.item() - got.item()) <= 1e-5
    expected.backward()
    got.backward()
    ours_by_name = dict(to_released(ours.config, {n: p.grad for n, p in ours.named_parameters()}))
    theirs_by_name = dict(by_expert({n: p.grad for n, p in their.named_parameters()}))
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, grad in ours_by_name.items():
        # Gradients of embeddings are of order 10 here, 1 / their size, so the bound is relative for large gradients.
        assert (grad - theirs_by_name[name]).abs().max() <= 1e-5 * grad.abs().max().clamp(min=1), name


def by_expert(tensors):
    """transformers has stacked experts; released checkpoints have single ones."""
    for name, x in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(x):
                for half, part in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{e}.{half}.weight"), part
        elif name.endswith("experts.down_proj"):
            for e, part in enumerate(x):
                yield name.replace("down_proj", f"{e}.down_proj.weight"), part
        else:
            yield name, x


def test_cached(pair):
    check_cached(*pair[:2])


def test_left_padding(pair):
    check_left_padding(*pair[:2])


def test_balance_loss_of_one_layer():
    """Ours is a mean over layers, theirs pools the layers, so they are equal for one sparse layer."""
    from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

    their = theirs(mlp_only_layers=(0, 1, 2))
    ids, mask = tokens(50), torch.ones(2, 50, dtype=torch.long)
    mask[1, 30:] = 0
    out = their(ids, attention_mask=mask, output_router_logits=True)
    model = q.Qwen3Next(small_config(mlp_only_layers=(0, 1, 2)))
    router = model.blocks[3].mlp
    expected = load_balancing_loss_func(out.router_logits, 8, 3, mask)
    from layers.moe import router_stats

    logits = out.router_logits[0].view(2, 50, 8)
    probabilities = logits.softmax(-1)
    stats = router_stats(logits, probabilities, probabilities.topk(router.top_k).indices, mask.bool())
    torch.testing.assert_close(stats.balance, expected)


def test_bf16_is_no_further_from_fp64_than_transformers(pair):
    their, ours = pair
    import copy

    ids = tokens(100)
    with torch.no_grad():
        exact = copy.deepcopy(ours).double()(ids).logits
        a = copy.deepcopy(ours).bfloat16()(ids).logits.double()
        b = copy.deepcopy(their).bfloat16()(ids).logits.double()
    assert (a - exact).abs().mean() <= 1.25 * (b - exact).abs().mean()


def test_what_we_save_opens_in_transformers_with_equal_logits(pair, tmp_path):
    their, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens(30)).logits, their(tokens(30)).logits)


def test_the_auto_class_here_is_transformers_own(tmp_path):
    """Also where tests of qwen3next.hf, which gives it ours, ran before."""
    theirs().save_pretrained(tmp_path)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.Qwen3NextForCausalLM
