"""The whole model: packed equals separate, padded equals unpadded, cached equals cold, losses, counts."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config, small_model

import qwen3next as q
from layers.segments import Segments
from layers.state.kv_cache import KVCache


def ids(*shape, seed=0):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_packed_equals_separate_in_values_and_gradients(model64, backend):
    """Including MTP and both losses; the total omits router losses, which are means over all tokens."""
    model64.config = model64.config.replace(router_aux_loss_coef=0.0)
    model64.set_backend("delta_rule", backend)
    lengths = [70, 1, 3, 66]
    tokens = ids(1, sum(lengths))
    packed = Segments.from_lengths([lengths])
    parts = tokens.split(lengths, dim=1)
    with torch.no_grad():
        together = model64(tokens, segments=packed).logits
        apart = torch.cat([model64(part).logits for part in parts], dim=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)

    loss = model64.loss(tokens, segments=packed)
    separate = [model64.loss(part) for part in parts if part.shape[1] > 1]
    assert loss.targets == sum(x.targets for x in separate) == 69 + 2 + 65
    lm = sum(x.lm * x.targets for x in separate) / loss.targets
    two_ahead = [max(k - 2, 0) for k in lengths if k > 1]
    mtp = sum(x.mtp * n for x, n in zip(separate, two_ahead, strict=True)) / sum(two_ahead)
    torch.testing.assert_close(loss.lm, lm)
    torch.testing.assert_close(loss.mtp, mtp)
    total = lm + model64.config.mtp_loss_coef * mtp
    assert_same(gradients(model64, loss.total), gradients(model64, total))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded_in_values_and_gradients(model64, side):
    lengths, t = (5, 70, 66), 75
    tokens, mask = ids(3, t), torch.zeros(3, t, dtype=torch.long)
    for r, n in enumerate(lengths):
        mask[r, slice(t - n, t) if side == "left" else slice(0, n)] = 1
    padded = Segments.from_mask(mask)
    with torch.no_grad():
        logits = model64(tokens, segments=padded).logits
        for r in range(3):
            alone = model64(tokens[r][mask[r] == 1][None]).logits
            torch.testing.assert_close(logits[r][mask[r] == 1], alone[0], rtol=0, atol=1e-10)
    joined = torch.cat([tokens[r][mask[r] == 1] for r in range(3)])[None]
    a = model64.loss(tokens, segments=padded)
    b = model64.loss(joined, segments=Segments.from_lengths([lengths]))
    torch.testing.assert_close(a.total, b.total)  # including router losses, which ignore padding
    assert_same(gradients(model64, a.total), gradients(model64, b.total))


@pytest.mark.parametrize("cut", [1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize("interval", [2, 4])
def test_cached_equals_cold_at_any_offset(cut, interval):
    model = small_model(dtype=torch.float64, full_attention_interval=interval)
    tokens = ids(2, 132)
    with torch.no_grad():
        cold = model(tokens).logits
        cache = model.new_cache(batch=2, max_len=132)
        parts = [model(tokens[:, :cut], cache=cache).logits]
        parts += [model(tokens[:, t : t + 1], cache=cache).logits for t in range(cut, 132)]
    torch.testing.assert_close(torch.cat(parts, 1), cold, rtol=0, atol=1e-10)
    assert cache.lengths == (132, 132)
    assert torch.equal(cache.tokens, tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompts_cache_equals_single_ones(model64, side):
    """Lengths, keys, values, conv state and recurrent state; then decoding continues as for each row alone."""
    lengths, t = (2, 70, 5), 71
    tokens, mask = ids(3, t), torch.zeros(3, t, dtype=torch.long)
    for r, n in enumerate(lengths):
        mask[r, slice(t - n, t) if side == "left" else slice(0, n)] = 1
    cache = model64.new_cache(batch=3, max_len=80)
    with torch.no_grad():
        model64(tokens, segments=Segments.from_mask(mask), cache=cache)
        after = [model64(ids(3, 1, seed=i), cache=cache).logits for i in range(3)]
        # A second padded chunk, after caches of unequal lengths.
        more = Segments.from_mask(torch.tensor([[1, 1], [0, 1], [1, 0]]))
        last = model64(ids(3, 2, seed=9), segments=more, cache=cache).logits
    assert cache.lengths == (7, 74, 9)
    for r, extra in enumerate((slice(0, 2), slice(1, 2), slice(0, 1))):
        alone = model64.new_cache(max_len=80)
        with torch.no_grad():
            model64(tokens[r][mask[r] == 1][None], cache=alone)
            for i in range(3):
                logits = model64(ids(3, 1, seed=i)[r : r + 1], cache=alone).logits
                torch.testing.assert_close(after[i][r], logits[0], rtol=0, atol=1e-10)
            logits = model64(ids(3, 2, seed=9)[r : r + 1, extra], cache=alone).logits
        torch.testing.assert_close(last[r, extra], logits[0], rtol=0, atol=1e-10)
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            for name in ("k", "v") if isinstance(theirs, KVCache) else ("conv", "recurrent"):
                got, value = getattr(ours, name)[r], getattr(theirs, name)
                if name in ("k", "v"):
                    got, value = got[: alone.lengths[0]], value[:, : alone.lengths[0]]
                torch.testing.assert_close(got, value[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["left", "right", "packed"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_prompts_of_unequal_lengths_prefill_as_single_ones(model64, way, backend, chunk):
    """In chunks after earlier tokens in the cache; compares caches, MTP's part and last logits."""
    model64.set_backend("attention", backend)
    first, second = (9, 70, 1, 130), (5, 1, 66, 3)
    text = ids(4, 210)
    cache = model64.new_cache(batch=4, max_len=300, mtp=True)
    begins = [0] * 4
    for lengths in (first, second):
        parts = [text[r, b : b + n] for r, (b, n) in enumerate(zip(begins, lengths, strict=True))]
        if way == "packed":
            rows = [torch.cat(parts[:2]), torch.cat(parts[2:])]
            segments = Segments.from_lengths([list(lengths[:2]), list(lengths[2:])])
        else:
            rows, t = parts, max(lengths) + 2
            places = [slice(t - n, t) if way == "left" else slice(0, n) for n in lengths]
            mask = torch.zeros(4, t, dtype=torch.long)
            for r, place in enumerate(places):
                mask[r, place] = 1
            segments = Segments.from_mask(mask)
        given = ids(segments.batch, segments.length, seed=5)
        for r, row in enumerate(rows):
            given[r, segments.mask[r]] = row
        done = [d for d, _ in model64.prefill(given, cache, chunk, segments=segments)]
        assert done[-1] == segments.length
        assert max(b - a for a, b in zip([0, *done], done, strict=False)) <= chunk
        begins = [b + n for b, n in zip(begins, lengths, strict=True)]
    assert cache.lengths == tuple(a + b for a, b in zip(first, second, strict=True))
    token = torch.tensor([5, 6, 7, 8])
    ahead = model64.draft(cache, token)
    for r, n in enumerate(cache.lengths):
        alone = model64.new_cache(max_len=300, mtp=True)
        list(model64.prefill(text[r : r + 1, :n], alone))
        close = {"rtol": 0, "atol": 1e-10}
        torch.testing.assert_close(cache.last_logits[r], alone.last_logits[0], **close)
        torch.testing.assert_close(ahead[r], model64.draft(alone, token[r : r + 1])[0], **close)
        for ours, theirs in zip([*cache.layers, cache.mtp], [*alone.layers, alone.mtp], strict=True):
            for name in ("k", "v") if isinstance(theirs, KVCache) else ("conv", "recurrent"):
                got, value = getattr(ours, name)[r], getattr(theirs, name)[0]
                held = n - (theirs is alone.mtp) if name in ("k", "v") else len(value)
                torch.testing.assert_close(got[:held], value[:held], **close)


def test_packed_prompts_generate_as_single_ones(model64):
    text = ids(1, 30)
    segments = Segments.from_lengths([[12, 18]])
    together = torch.stack(list(q.stream(model64, text, segments=segments, max_new_tokens=5)), dim=1)
    for r, prompt in enumerate((text[:, :12], text[:, 12:])):
        assert torch.equal(together[r], q.generate(model64, prompt, max_new_tokens=5)[0, prompt.shape[1] :])


def test_chunked_prefill_equals_one_shot(model64):
    tokens, cache = ids(1, 150), model64.new_cache(max_len=150)
    assert list(model64.prefill(tokens, cache, chunk_size=64)) == [(64, 150), (128, 150), (150, 150)]
    torch.testing.assert_close(cache.last_logits, model64(tokens).logits[:, -1], rtol=0, atol=1e-10)


def test_gradients_reach_every_parameter():
    model = small_model(mlp_only_layers=(1,))
    loss = model.loss(ids(2, 80))
    got = gradients(model, loss.total)
    assert got.keys() == dict(model.named_parameters()).keys()
    assert all(bool(g.abs().sum() > 0) for g in got.values())


def test_mtp_reads_the_normed_hidden_state_and_predicts_two_ahead(model64):
    """Pinned, because with the state before the final norm drafts look fluent but are rarely accepted."""
    tokens = ids(1, 20)
    out = model64(tokens)
    mtp, head = model64.mtp, model64.lm_head
    following = model64.embed_tokens(tokens[:, 1:])
    joined = torch.cat((mtp.pre_fc_norm_embedding(following), mtp.pre_fc_norm_hidden(out.hidden[:, :-1])), -1)
    seen = []
    mtp.fc.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    loss = model64.loss(tokens)
    torch.testing.assert_close(seen[0][:, :-1], joined)
    ahead = []
    mtp.norm.register_forward_hook(lambda _m, _args, y: ahead.append(y))
    model64.loss(tokens)
    expected = torch.nn.functional.cross_entropy(head(ahead[0][0, :-2]), tokens[0, 2:])
    torch.testing.assert_close(loss.mtp, expected)


def test_labels_mask_targets(model64):
    tokens = ids(1, 10)
    labels = tokens.clone()
    labels[0, :6] = -100
    logits = model64(tokens).logits[0]
    loss = model64.loss(tokens, labels=labels)
    torch.testing.assert_close(loss.lm, torch.nn.functional.cross_entropy(logits[5:-1], tokens[0, 6:]))
    assert loss.targets == 4
    with pytest.raises(ValueError, match="at least two tokens"):
        model64.loss(tokens[:, :1])
    with pytest.raises(ValueError, match="The labels of all tokens that have one before them are -100"):
        model64.loss(tokens, labels=torch.full_like(tokens, -100))
    first = torch.full_like(tokens, -100).index_fill(1, torch.tensor([0]), 5)  # the first token is never predicted
    with pytest.raises(ValueError, match="The labels of all tokens that have one before them are -100"):
        model64.loss(tokens, labels=first)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.full((1, 10), 97), "labels contain 97: use ids of 0 to 96, or -100"),
        (torch.full((1, 10), -1), "labels contain -1: use ids of 0 to 96, or -100"),
        (torch.zeros(1, 9, dtype=torch.long), r"labels have shape \(1, 9\) and input_ids \(1, 10\): make them equal"),
        (torch.zeros(10, dtype=torch.long), r"labels must be integers of shape \(b, t\), got int64 of shape \(10,\)"),
        (torch.zeros(1, 10), r"labels must be integers of shape \(b, t\), got float32"),
    ],
)
def test_labels_that_do_not_serve(model64, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        model64.loss(ids(1, 10), labels=labels)


def test_tied_embeddings_are_one_parameter():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_bf16_stays_near_fp32():
    """Not a parity bound: in bf16 the same weights give the same model up to rounding and other expert choices."""
    model = small_model()
    tokens = ids(2, 100)
    with torch.no_grad():
        exact = model(tokens).logits
        rounded = small_model(dtype=torch.bfloat16)(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_autocast_trains():
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(ids(2, 80), segments=Segments.from_lengths([[50, 30], [80]]))
    low.total.backward()
    full = model.loss(ids(2, 80), segments=Segments.from_lengths([[50, 30], [80]]))
    assert abs(low.total.item() - full.total.item()) < 0.05


def test_fp16_autocast_trains_with_a_scaler():
    """Also packed and dense; fp16 has 11 bits, so gradients equal those of fp32 to a percent if no choice changes."""
    for changes in ({}, {"num_experts": 0}):
        model, segments = small_model(**changes), Segments.from_lengths([[50, 30], [75]])
        exact = model.loss(ids(2, 80), segments=segments)
        expected = gradients(model, exact.total)
        model.zero_grad()
        adam, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=8.0)
        with torch.autocast("cpu", torch.float16):
            low = model.loss(ids(2, 80), segments=segments)
        scaler.scale(low.total).backward()
        scaler.unscale_(adam)
        assert abs(low.total.item() - exact.total.item()) < 5e-3
        for name, parameter in model.named_parameters():
            alike = F.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
            assert float(alike) > 0.98, name
        scaler.step(adam)
        scaler.update()
        assert scaler.get_scale() == 8.0  # nothing overflowed


def test_experts_are_chosen_for_the_dtype_of_their_products():
    model = small_model()
    for name in ("cpp", "grouped"):
        model.set_backend("experts", name)
        sentence = f"The '{name}' backend of experts cannot run here: .*float16"
        with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match=sentence):
            model(ids(1, 20))


def test_the_80b_preset_builds_on_meta():
    with torch.device("meta"):
        model = q.Qwen3Next(q.presets.qwen3_next_80b_a3b())
    main = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mtp."))
    assert main == 79_674_391_296


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m(torch.tensor([[97]])), "encode the text with this model's tokenizer"),
        (lambda m: m(torch.tensor([[-1]])), "encode the text with this model's tokenizer"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "shape"),
        (lambda m: m(ids(2, 3), segments=Segments.from_lengths([[3]])), "segments describe"),
        (lambda m: m(ids(2, 3), cache=m.new_cache(batch=1)), "made for 1 sequences and 2"),
        (lambda m: m(ids(1, 9), cache=m.new_cache(max_len=8)), "larger max_len"),
        (
            lambda m: m(ids(1, 4), segments=Segments.from_lengths([[2, 2]]), cache=m.new_cache()),
            "made for 1 sequences and 2",
        ),
        (lambda m: m.new_cache(max_len=0), "at least one"),
        (lambda m: m.new_cache(kv_dtype="int3"), "'int3' is not a supported KV cache dtype: choose .* or int8"),
        (lambda m: m.set_backend("attention", "magic"), "no backend"),
        (lambda m: m.set_backend("magic", "auto"), "no operation"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(small_model())


def test_a_refused_call_leaves_the_cache_as_it_was():
    model = small_model()
    cache = model.new_cache(max_len=8)
    model(ids(1, 5), cache=cache)

    def contents():
        pairs = ((y.k, y.v) if isinstance(y, KVCache) else (y.conv, y.recurrent) for y in cache.layers)
        return [x.clone() for pair in pairs for x in pair]

    before = contents()
    for bad, sentence in ((ids(1, 4), "max_len"), (torch.tensor([[97]]), "tokenizer")):
        with pytest.raises(ValueError, match=sentence):
            model(bad, cache=cache)
    assert cache.lengths == (5,)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(), strict=True))


def test_cache_bytes_follow_the_formula():
    config = small_config()
    model = small_model()
    cache = model.new_cache(batch=3, max_len=50)
    model(ids(3, 50), cache=cache)
    assert cache.nbytes() == 3 * (50 * config.bytes_per_token(4) + config.bytes_per_sequence(4))
    big = q.presets.qwen3_next_80b_a3b()
    assert big.bytes_per_token() == 24 * 2**10
    assert big.bytes_per_sequence() == 36 * (2 * 2**20 + 8192 * 3 * 2)


def test_a_zero_in_a_mask_is_a_token_that_is_not_there(model64):
    """Absent tokens at any position do not change logits, residual stream, losses, gradients, caches and generation."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (3, 90), generator=generator)
    mask = torch.rand(3, 90, generator=generator) < torch.tensor([[0.7], [0.95], [1.1]])
    mask[0, :5] = mask[1, 80:] = False
    segments = Segments.from_mask(mask.long())
    assert segments.gapped
    texts = [ids[r, mask[r]][None] for r in range(3)]
    out, stream = model64(ids, segments=segments), model64.residual(2, ids, segments=segments)
    last = model64(ids, segments=segments, logits_to_keep=7).logits
    for r, text in enumerate(texts):
        assert (out.logits[r, mask[r]] - model64(text).logits[0]).abs().max() < 1e-10
        assert (stream[r, mask[r]] - model64.residual(2, text)[0]).abs().max() < 1e-10
    assert (last - out.logits[:, -7:]).abs().max() < 1e-10

    packed = torch.cat(texts, dim=1)
    whole = Segments.from_lengths([[text.shape[1] for text in texts]])
    gradients = []
    for x, s in ((ids, segments), (packed, whole)):
        model64.zero_grad()
        loss = model64.loss(x, segments=s)
        loss.total.backward()
        gradients.append((loss, [p.grad.clone() for p in model64.parameters()]))
    (a, first), (b, second) = gradients
    assert (a.total - b.total).abs() < 1e-10
    assert a.targets == b.targets
    assert max((x - y).abs().max() for x, y in zip(first, second, strict=True)) < 1e-10
    labels = ids.masked_fill(torch.rand(3, 90, generator=generator) < 0.3, -100)
    sparse = torch.cat([labels[r, mask[r]][None] for r in range(3)], dim=1)
    a, b = model64.loss(ids, segments=segments, labels=labels), model64.loss(packed, segments=whole, labels=sparse)
    assert (a.total - b.total).abs() < 1e-10

    cache = model64.new_cache(3)
    with torch.no_grad():
        cached = model64(ids, segments=segments, cache=cache).logits
    assert (cached - out.logits)[mask].abs().max() < 1e-10
    assert cache.lengths == tuple(text.shape[1] for text in texts)
    new = torch.stack(list(q.stream(model64, ids, segments=segments, max_new_tokens=4)), dim=1)
    for r, text in enumerate(texts):
        assert cache.tokens[r, : text.shape[1]].tolist() == text[0].tolist()
        assert torch.equal(new[r], q.generate(model64, text, max_new_tokens=4)[0, -4:])
    seen = []
    model64.run_with_hooks(
        ids, segments=segments, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: seen.append(x))]
    )
    together, closed = segments.closed(ids)
    _, acts = model64.run_with_cache(together, segments=closed)
    assert torch.equal(seen[0], acts["blocks.1.hook_resid_post"])
    with pytest.raises(ValueError, match=r"segments that segments\.closed"):
        model64.run_with_cache(ids, segments=segments)
    with pytest.raises(ValueError, match="segments describe 3 x 90 tokens, but"):
        model64(ids[:, :5], segments=segments)
