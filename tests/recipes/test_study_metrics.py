"""The study's metrics against plain computations, its toy task, and its text windows with a common first token."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_model

from recipes.study import toy
from recipes.study.metrics import measure, running_median, training_statistics
from recipes.study.text import BosWindows, HeldOut, bos_id, prepare_text
from recipes.study.toy import BigramBackcopy, ToyLook
from recipes.training.shards import open_split, read_meta
from recipes.training.tokenizer import byte_tokenizer

IDS = torch.randint(0, 97, (6, 80), generator=torch.Generator().manual_seed(0))


def softmax_model(**changes):
    return small_model(full_attention_interval=1, num_hidden_layers=2, mtp_num_hidden_layers=0, **changes)


def cached(model, point):
    names = [f"blocks.{i}.{point}" for i in range(2)]
    with torch.no_grad(), model.materialize(pattern=[0, 1]):
        _, acts = model.run_with_cache(IDS, names_filter=names)
    return [acts[name] for name in names]


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
def test_figures_are_what_the_points_give(gate):
    """The oracle uses all rows at once; `measure` adds up batches of unequal size."""
    model = softmax_model(attention_gate=gate)
    found = measure(model, IDS.split([1, 2, 3]))
    for layer, a in enumerate(cached(model, "self_attn.hook_pattern")):
        to_first = a[..., 0]
        assert found["layers"]["first_token_attention"][layer] == pytest.approx(to_first[:, :, 1:].mean().item())
        assert found["layers"]["first_token_attention_with_t0"][layer] == pytest.approx(to_first.mean().item())
        rate = np.mean([float(row[:64].mean() > 0.3) for row in to_first.flatten(0, 1)])
        assert found["layers"]["sink_rate"][layer] == pytest.approx(rate)
    for layer, x in enumerate(cached(model, "hook_resid_post")):
        assert found["layers"]["massive_activation"][layer] == pytest.approx(x.abs().max().item())
        norms = x.norm(dim=-1)
        ratio = (norms[:, 0] / norms[:, 1:].mean(1)).mean().item()
        assert found["layers"]["residual_norm_ratio"][layer] == pytest.approx(ratio)
        medians = [part.abs().median().item() for part in x.split([1, 2, 3])]
        assert found["layers"]["median_activation"][layer] == pytest.approx(np.mean(medians))
        assert found["layers"]["massive_ratio"][layer] == pytest.approx(x.abs().max().item() / np.mean(medians))
    for layer, v in enumerate(cached(model, "self_attn.hook_v")):
        norms = v.norm(dim=-1)
        ratio = (norms[:, 0] / norms[:, 1:].mean(1)).mean().item()
        assert found["layers"]["value_norm_ratio"][layer] == pytest.approx(ratio)
    if gate == "none":
        assert "gate_mean" not in found
    else:
        for layer, g in enumerate(cached(model, "self_attn.hook_gate")):
            assert found["layers"]["gate_mean"][layer] == pytest.approx(g.mean().item())
            assert found["layers"]["gate_closed"][layer] == pytest.approx((g < 0.1).float().mean().item())
            assert found["layers"]["gate_first_token"][layer] == pytest.approx(g[:, 0].mean().item())
            assert found["layers"]["gate_rest"][layer] == pytest.approx(g[:, 1:].mean().item())
    assert found["sink_rate"] == pytest.approx(np.mean(found["layers"]["sink_rate"]))


def test_attention_that_is_even_or_sinks():
    """Equal scores give 1 / (t + 1); scores that select the first token give 1."""
    model = softmax_model(attention_gate="none")
    model.set_backend("attention", "eager")

    def even(scores, hook):
        return torch.where(scores.isinf(), scores, torch.zeros_like(scores))

    def sink(scores, hook):
        return torch.where(scores.isinf(), scores, torch.arange(scores.shape[-1]) * -1e4)

    with model.hooks([("blocks.*.self_attn.hook_scores", even)]):
        found = measure(model, [IDS])
    assert found["first_token_attention"] == pytest.approx(np.mean([1 / (t + 1) for t in range(1, 80)]))
    assert found["sink_rate"] == 0.0
    with model.hooks([("blocks.*.self_attn.hook_scores", sink)]):
        found = measure(model, [IDS])
    assert found["first_token_attention"] == found["sink_rate"] == 1.0


def test_hybrids_are_measured_in_their_softmax_layers_and_others_refused():
    model = small_model(num_hidden_layers=4)
    found = measure(model, [IDS])
    assert len(found["layers"]["first_token_attention"]) == len(found["layers"]["massive_activation"]) == 1
    assert not any(point.armed for point in model.hook_dict.values())
    with pytest.raises(ValueError, match="no softmax layer"):
        measure(small_model(num_hidden_layers=2), [IDS])


def test_queries_part_the_attention():
    model = softmax_model(attention_gate="none")
    found = measure(model, [IDS], queries=lambda ids: {"low": ids < 50, "high": ids >= 50})
    for layer, a in enumerate(cached(model, "self_attn.hook_pattern")):
        low = (IDS[:, 1:] < 50)[:, None].expand(-1, 4, -1)
        assert found["layers"]["first_token_attention_low"][layer] == pytest.approx(a[:, :, 1:, 0][low].mean().item())
        assert found["layers"]["first_token_attention_high"][layer] == pytest.approx(a[:, :, 1:, 0][~low].mean().item())


def test_statistics_of_a_run():
    """A falling loss with two spikes, 300 steps after ten of warm-up."""
    losses = [10.0] * 10 + [3 - i / 200 for i in range(300)]
    losses[50] += 0.5
    losses[120] += 0.15
    rows = [{"step": i + 1, "lm": x, "gradient_norm": 1.0 + (i == 50)} for i, x in enumerate(losses)]
    rows[7]["gradient_norm"] = None  # a step that was skipped
    found = training_statistics(rows, warmup=10)
    assert found["spikes"] == 2
    assert found["worst_spike"] == pytest.approx(0.5, abs=0.01)
    assert found["loss"] == pytest.approx(np.mean(losses[-30:]))
    assert found["best_loss"] == pytest.approx(np.mean(losses[-30:]))
    assert found["gradient_norm_max"] == 2.0
    assert found["gradient_norm_median"] == 1.0
    assert set(training_statistics(rows[:5], warmup=10).values()) == {None}


def test_outliers_do_not_count_the_noise_of_small_batches():
    noisy = np.random.default_rng(0).normal(3.0, 0.3, 2000)
    noisy[700] += 5.0
    found = training_statistics(
        [{"step": i + 1, "lm": float(x), "gradient_norm": 1.0} for i, x in enumerate(noisy)], warmup=0
    )
    assert found["outliers"] == 1
    assert found["spikes"] > 500  # with the paper's 0.1 nats, which are below the noise


def test_running_median_at_the_ends():
    x = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert running_median(x, 3).tolist() == [5.0, 4.0, 2.0, 3.0, 3.0]
    falling = np.arange(50.0, 0.0, -1.0)
    assert running_median(falling, 21).tolist() == falling.tolist()


# ---- the toy


def test_toy_sequences_obey_their_rules():
    """Copies after triggers, no consecutive triggers, BOS only at the start; a pure function of the sample number."""
    task = BigramBackcopy(window=50, seed=3)
    ids, documents = task.batch(7, 40)
    assert ids.shape == (40, 50)
    assert documents.sum() == 0
    assert torch.equal(ids[5:9], task.batch(12, 4).input_ids)
    assert not torch.equal(ids, BigramBackcopy(window=50, seed=4).batch(7, 40).input_ids)
    assert (ids[:, 0] == toy.BOS).all()
    assert (ids[:, 1:] < toy.VOCABULARY).all()
    triggers = ids < toy.TRIGGERS
    assert not (triggers[:, 1:] & triggers[:, :-1]).any()
    row, column = triggers[:, :-1].nonzero(as_tuple=True)
    assert len(row) > 50
    assert torch.equal(ids[row, column + 1], ids[row, column - 1])


def test_toy_tokens_are_drawn_as_the_chain_says():
    task = BigramBackcopy(window=200, seed=0)
    ids = task.batch(0, 200).input_ids.numpy()
    p = toy.transitions()
    np.testing.assert_allclose(p.sum(1), 1.0)
    np.testing.assert_allclose(p[:, : toy.TRIGGERS].sum(1), toy.TRIGGER_SHARE)
    most = np.bincount(ids[:, 1:-1].ravel())[toy.TRIGGERS :].argmax() + toy.TRIGGERS
    following = ids[:, 2:][ids[:, 1:-1] == most]
    counts = np.bincount(following, minlength=toy.VOCABULARY) / len(following)
    # Standard deviations of a share are at most 0.5 / sqrt(n).
    assert np.abs(counts - p[most]).max() < 4 * 0.5 / math.sqrt(len(following))


def test_toy_losses_are_told_apart():
    """An ideal model has no loss after triggers and the chain's entropy elsewhere."""
    task, p = BigramBackcopy(window=64, seed=0), torch.from_numpy(toy.transitions()).float()

    class Perfect(torch.nn.Module):
        embed_tokens = torch.nn.Embedding(65, 2)

        def forward(self, ids):
            after = F.pad(p, (0, 1, 0, 1))[ids].clamp(min=1e-30).log()
            copied = F.one_hot(ids.roll(1, dims=1), 65).float().clamp(min=1e-30).log()
            return type("Out", (), {"logits": torch.where((ids < toy.TRIGGERS)[..., None], copied, after)})

    look = ToyLook(task, sequences=200)
    model = Perfect()
    import recipes.study.toy

    before = recipes.study.toy.measure
    try:
        recipes.study.toy.measure = lambda *_, **__: {}
        row = look(model)
    finally:
        recipes.study.toy.measure = before
    assert row["copy_nats"] == pytest.approx(0.0, abs=1e-6)
    assert row["bigram_nats"] == pytest.approx(0.0, abs=0.05)  # about 11,000 sampled tokens


# ---- text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "source").mkdir()
    for i in range(30):
        (folder / "source" / f"{i}.py").write_text("".join(f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(9)))
    tokenizer, meta = prepare_text(str(folder / "source"), "bytes", folder / "out")
    return folder / "out", tokenizer, meta


def test_windows_begin_with_one_token_and_are_one_sequence(text):
    folder, tokenizer, _ = text
    windows = BosWindows(folder / "data", "train", window=20, seed=1, bos=bos_id(tokenizer))
    ids, documents = windows.batch(3, 5)
    assert ids.shape == (5, 20)
    assert ids[:, 0].tolist() == [bos_id(tokenizer)] * 5 == [257] * 5
    assert documents.sum() == 0
    assert torch.equal(ids[2:4], windows.batch(5, 2).input_ids)
    assert (ids[:, 1:] != 257).all()
    with pytest.raises(ValueError, match="begins every window"):
        bos_id(byte_tokenizer())


def test_every_held_out_token_is_in_one_window_and_bits_are_of_bytes(text):
    folder, _, meta = text
    held_out = HeldOut(folder / "data", 20, 257, looks=4, rows=3)
    tokens, _ = open_split(folder / "data", "val")
    assert held_out.windows[:, 1:].flatten().tolist() == tokens[: len(tokens) // 19 * 19].tolist()
    assert held_out.some.shape == (4, 20)
    model = small_model(vocab_size=258, num_hidden_layers=2, full_attention_interval=1, mtp_num_hidden_layers=0)
    nats = held_out.nats(model, held_out.windows)
    with torch.no_grad():
        p = model(held_out.windows).logits[:, :-1].log_softmax(-1)
    expected = -p.gather(-1, held_out.windows[:, 1:, None]).mean().item()
    assert nats == pytest.approx(expected, rel=1e-5)
    assert meta == read_meta(folder / "data")
    per_byte = meta.tokens["val"] / meta.utf8_bytes["val"]
    assert held_out.bits_per_byte(math.log(2)) == pytest.approx(per_byte)
    row = held_out(model)
    assert row["val_nats"] == pytest.approx(held_out.nats(model, held_out.some))
    assert row["first_token_attention"] == pytest.approx(measure(model, [held_out.some])["first_token_attention"])
    with pytest.raises(ValueError, match="give more text"):
        _ = HeldOut(folder / "data", 10**6, 257).windows
