"""Compiled decoding steps against the modules: values, caches, update logs, and when the modules run instead."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from conftest import small_model
from parity import tokens

import qwen3next as q
from layers.cpp import build
from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from qwen3next.decoding import plan as decode
from qwen3next.decoding import rotations
from qwen3next.decoding.plan import MOST_TOKENS
from qwen3next.inputs import as_ids

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(build.missing() is not None, reason=f"compiled code cannot run: {build.missing()}"),
]

SHAPES = {
    "hybrid": {},
    "dense and sparse": {"mlp_only_layers": (1, 3)},
    "dense": {"num_experts": 0},
    "linear layers only": {"num_hidden_layers": 2, "layer_types": ("linear_attention",) * 2},
    "one key head each": {"linear_num_key_heads": 4, "num_key_value_heads": 4},
    "odd sizes": {"hidden_size": 52, "moe_intermediate_size": 19, "shared_expert_intermediate_size": 7, "head_dim": 20,
                  "partial_rotary_factor": 0.5, "linear_key_head_dim": 5, "linear_value_head_dim": 9},
    "two taps": {"linear_conv_kernel_dim": 2},
    "not renormalised": {"norm_topk_prob": False},
    "headwise gate": {"model_type": "qwen3", "attention_gate": "headwise", "zero_centred_norms": False,
                      "num_experts": 0, "partial_rotary_factor": 1.0, "layer_types": ("full_attention",) * 4},
    "no gate, biases": {"model_type": "qwen3", "attention_gate": "none", "zero_centred_norms": False,
                        "attention_bias": True, "use_qk_norm": False, "num_experts": 0,
                        "partial_rotary_factor": 1.0, "layer_types": ("full_attention",) * 4},
}  # fmt: skip


def both(model, lengths, steps, **options):
    """Logits and caches of the modules and of compiled code, for the same prompts and steps."""
    found = []
    for backend in ("torch", "cpp"):
        cache = model.new_cache(len(lengths), max_len=400, **options)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids = tokens(max(lengths), b=len(lengths))
        list(model.prefill(ids, cache, segments=Segments.from_mask(mask)))
        model.set_backend("decode", backend)
        found.append((torch.stack([model.step(tokens(t, b=len(lengths)), cache) for t in steps]), cache))
        model.set_backend("decode", "auto")
    return found


def apart(found):
    """Largest differences of logits, and of states, keys and values."""
    (a, one), (b, two) = found
    parts = []
    for x, y in zip(one.layers, two.layers, strict=True):
        if isinstance(x, DeltaNetState):
            parts += [(x.conv, y.conv), (x.recurrent, y.recurrent)]
        else:
            parts += zip(x.read(0, min(one.lengths)), y.read(0, min(one.lengths)), strict=True)
    return (a - b).abs().max().item(), max((x.double() - y.double()).abs().max().item() for x, y in parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_in_fp64(shape):
    """Steps of one and of several tokens, rows of one length and of several, a context that spans several pieces."""
    model = small_model(dtype=torch.float64, **SHAPES[shape])
    assert decode.why_not(model, "cpp") is None
    for lengths in ((70,), (9, 9), (3, 40, 1)):
        steps = (1, 1, 2, 5, 1)
        assert max(apart(both(model, lengths, steps))) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.bfloat16, 0.5)])
def test_values_in_less(dtype, bound):
    """Equal up to rounding: logits are of order 1, with a bf16 ulp of 2^-7, which four layers amplify."""
    model = small_model(dtype=dtype)
    logits, states = apart(both(model, (70,), [1] * 5))
    assert 0 < logits < bound
    assert states < bound / 2


def test_bf16_is_no_further_from_the_truth_than_the_modules():
    model = small_model(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    truth = both(exact, (70,), [1] * 12)[0][0]
    by_modules, compiled = (
        (logits.double() - truth).square().mean().sqrt() for logits, _ in both(model, (70,), [1] * 12)
    )
    assert compiled < 1.3 * by_modules


@pytest.mark.parametrize(
    "options",
    [{"kv_dtype": "float32"}, {"kv_dtype": "bfloat16"}, {"kv_dtype": "int8"}, {"state_dtype": "bfloat16"},
     {"state_dtype": "float32"}, {"history": 4}, {"mtp": True}],
)  # fmt: skip
def test_caches_of_every_kind(options):
    """The same roundings; a number halfway between two values may round either way."""
    model = small_model(dtype=torch.float64)
    logits, states = apart(both(model, (40, 40), [1, 1, 2], **options))
    assert max(logits, states) < (1e-12 if options.keys() & {"history", "mtp"} else 1e-2)
    if options == {"history": 4}:
        for cache in (found[1] for found in both(model, (40,), [1] * 6, **options)):
            cache.rollback(3)
            assert cache.lengths == (43,)


def test_long_contexts_and_shared_beginnings():
    """A context of many pieces, some of which are shared with other caches."""
    model = small_model(dtype=torch.float64)
    cache, ids = model.new_cache(max_len=3000), tokens(2000, b=1)
    list(model.prefill(ids, cache))
    forks = [*cache.fork(2), cache]
    forks += forks[0].fork(1)
    for n, fork in enumerate(forks):
        more = tokens(n + 3, b=1)
        for token in more.split(1, dim=1):
            logits = model.step(token, fork)
        with torch.no_grad():
            expected = model(torch.cat((ids, more), dim=1)).logits[:, -1]
        assert (logits - expected).abs().max() < 1e-10


def ran(model, monkeypatch):
    """Counts compiled steps."""
    calls, real = [], decode.Plan.run

    def run(self, *args, **options):
        calls.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(decode.Plan, "run", run)
    return calls


def test_a_forward_runs_the_modules_and_a_step_compiled_code(monkeypatch):
    model = small_model()
    calls, cache = ran(model, monkeypatch), model.new_cache(2)
    with torch.no_grad():
        model(tokens(5), cache=cache)
        model(tokens(1), cache=cache)
        assert not calls
        model.step(tokens(1), cache)
        assert len(calls) == 1
        model.step(tokens(MOST_TOKENS + 1), cache)
        assert len(calls) == 1
        q.generate(model, tokens(5), max_new_tokens=4)
        assert len(calls) == 4
        model.set_backend("decode", "cpp")
        model(tokens(1), cache=cache)
        assert len(calls) == 4
        model.step(tokens(1), cache)
        assert len(calls) == 5
        model.set_backend("decode", "torch")
        model.step(tokens(1), cache)
        assert len(calls) == 5


def attach_forward_hook(model):
    return model.blocks[1].mlp.register_forward_hook(lambda *_: None)


def attach_root_hook(model):
    return model.register_forward_hook(lambda *_: None)


def attach_hook_point(model):
    return model.hook_dict["blocks.2.linear_attn.hook_beta"].register_forward_hook(lambda *_: None)


def replace_forward(model):
    model.blocks[0].mlp.forward = model.blocks[0].mlp.forward

    class Handle:
        def remove(self):
            del model.blocks[0].mlp.forward

    return Handle()


@pytest.mark.parametrize("attach", [attach_forward_hook, attach_root_hook, attach_hook_point, replace_forward])
def test_where_somebody_looks_the_modules_run(monkeypatch, attach):
    """Hooks and silently replaced modules take effect at the next step."""
    model = small_model()
    calls, cache = ran(model, monkeypatch), model.new_cache(2, max_len=200)
    model.step(tokens(3), cache)
    for n in (1, 2):
        handle = attach(model)
        model.step(tokens(1), cache)
        assert len(calls) == n
        handle.remove()
        model.step(tokens(1), cache)
        assert len(calls) == n + 1


def test_hooks_fire_in_generation():
    model, seen = small_model(), []
    q.generate(
        model,
        tokens(5),
        max_new_tokens=4,
        fwd_hooks=[("blocks.0.linear_attn.hook_beta", lambda x, hook: seen.append(1))],
    )
    assert len(seen) == 4


def test_changed_weights_and_modules_are_seen(monkeypatch):
    model = small_model(dtype=torch.float64)
    calls = ran(model, monkeypatch)

    def check(compiled):
        before = len(calls)
        assert max(apart(both_on_auto(model))) < 1e-12
        assert (len(calls) > before) == compiled

    def both_on_auto(model):
        found = []
        for backend in ("torch", "auto"):
            cache = model.new_cache(2)
            model.set_backend("decode", "auto")
            list(model.prefill(tokens(5), cache))
            model.decode_backend = backend
            found.append((model.step(tokens(1), cache), cache))
        return found

    check(compiled=True)
    with torch.no_grad():
        model.blocks[0].linear_attn.in_proj_qkv.weight.mul_(1.1)  # in place
        check(compiled=True)
        model.blocks[1].mlp.router.weight.data = model.blocks[1].mlp.router.weight.data * 1.5
        check(compiled=True)
        model.blocks[3].self_attn.o_proj = torch.nn.Linear(128, 64, bias=False, dtype=torch.float64)
        check(compiled=True)
        model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}, assign=True)
        check(compiled=True)

    class Other(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.blocks[3].self_attn.o_proj = Other(128, 64, bias=False, dtype=torch.float64)
    check(compiled=False)
    model.set_backend("decode", "auto")
    with pytest.raises(RuntimeError, match="o_proj is a Other"):
        model.set_backend("decode", "cpp") or model.step(tokens(1), model.new_cache(2))


def test_dtypes_that_it_does_not_know_run_in_the_modules(monkeypatch):
    model = small_model()
    calls = ran(model, monkeypatch)
    for options in ({"kv_dtype": "float16"}, {"state_dtype": "float16"}):
        cache = model.new_cache(2, **options)
        model.step(tokens(3), cache)
        model.step(tokens(1), cache)
        model.set_backend("decode", "cpp")
        with pytest.raises(RuntimeError, match="the cache has a dtype that it does not know"):
            model.step(tokens(1), cache)
        model.set_backend("decode", "auto")
    assert not calls


def test_threads_leave_no_trace():
    model, before = small_model(), torch.get_num_threads()
    cache = model.new_cache(2)
    list(model.prefill(tokens(70), cache))
    found = []
    try:
        for threads, fork in zip((1, 2, 5), cache.fork(3), strict=True):
            torch.set_num_threads(threads)
            found.append(torch.stack([model.step(tokens(1), fork) for _ in range(4)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_two_texts_at_once():
    """Two Python threads share a model, each with its own cache."""
    model, found = small_model(), {}

    def talk(n):
        found[n] = q.generate(model, tokens(n, b=1), max_new_tokens=30)

    at_once = [threading.Thread(target=talk, args=(n,)) for n in (5, 8, 13)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    for n, text in found.items():
        assert torch.equal(text, q.generate(model, tokens(n, b=1), max_new_tokens=30))


def test_copies_and_pickles_of_a_model_that_has_decoded():
    model = small_model()
    text = q.generate(model, tokens(5, b=1), max_new_tokens=5)
    assert torch.equal(q.generate(copy.deepcopy(model), tokens(5, b=1), max_new_tokens=5), text)


PROGRAM = """
import os, sys
os.environ["PATH"] = ""
import torch, warnings
import qwen3next as q
model = q.Qwen3Next(q.presets.tiny())
print(q.explain(model)[0].runs, q.explain(model)[0].faster)
print(q.generate(model, torch.zeros(1, 3, dtype=torch.long), max_new_tokens=3).shape[1])
try:
    model.set_backend("decode", "cpp")
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=home, check=False)
    assert done.returncode == 0, done.stderr
    explained, made, named = done.stdout.splitlines()
    assert explained.startswith("torch cpp: no C++ compiler was found; install g++")
    assert made == "6"
    assert "cannot run here: no C++ compiler was found" in named
    assert done.stderr.count("no C++ compiler") == 1


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty folder for compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.library.cache_clear()
    assert build.missing() is None


def test_what_cannot_be_compiled_gets_a_sentence(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.warns(UserWarning, match="torch's own operations run"):
        assert "does not work" in build.missing() or "cannot compile" in build.missing()
    assert not list(fresh.rglob("*.so"))


@pytest.mark.slow
def test_nothing_is_compiled_twice(fresh):
    assert build.missing() is None
    (made,) = fresh.rglob("*.so")
    when = made.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.missing() is None
    assert [(x, x.stat().st_mtime_ns) for x in fresh.rglob("*") if x.is_file()] == [(made, when)]


@torch.no_grad()
def test_a_model_with_weights_that_a_step_does_not_know_runs_its_modules():
    model = q.Qwen3Next(q.presets.tiny(sandwich_norm=True, mtp_num_hidden_layers=0))
    ids = torch.randint(0, 256, (1, 20))
    caches = [model.new_cache(max_len=30) for _ in "ab"]
    for cache in caches:
        model(ids, cache=cache)
    step = model.step(ids[:, :1], caches[0])
    assert torch.equal(step, model(ids[:, :1], cache=caches[1]).logits[:, -1])
    assert {row.operation: row.runs for row in q.explain(model)}["decode"] == "torch"
    model.set_backend("decode", "cpp")
    with pytest.raises(RuntimeError, match=r"attn_out_norm\.weight is a weight that it does not know"):
        model.step(ids[:, :1], caches[0])


def against_modules(model, steps=3, **options):
    """Largest difference between steps and modules, and the number of compiled steps."""
    apart, ran_before = 0.0, []
    run = decode.Plan.run
    decode.Plan.run = lambda *args: (ran_before.append(1), run(*args))[1]
    try:
        cache = model.new_cache(2, max_len=40, **options)
        list(model.prefill(tokens(7), cache))
        for t in range(steps):
            (other,) = cache.fork()
            ids = tokens(1) + t
            with torch.no_grad():
                expected = model(ids, cache=other).logits[:, -1]
            apart = max(apart, (model.step(ids, cache) - expected).abs().max().item())
    finally:
        decode.Plan.run = run
    return apart, len(ran_before)


def biased_head(model):
    model.lm_head = torch.nn.Linear(64, 97, dtype=torch.float64)


def scaled_embedding(model):
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    model.embed_tokens = Scaled(97, 64, dtype=torch.float64)


def weight_norm_head(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    model.lm_head.parametrizations.weight.original0.data.mul_(2)


def turned_head(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().mT.contiguous().mT)


def limited_embedding(model):
    model.embed_tokens.max_norm = 0.1


def other_eps_in_one_norm(model):
    model.blocks[1].input_layernorm.eps = 0.5


def fewer_experts_in_one_layer(model):
    model.blocks[2].mlp.top_k = 1


def wrapped_embedding(model):
    class Wrapped(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, ids):
            return 2 * self.base(ids)

    model.embed_tokens = Wrapped(model.embed_tokens)


def no_norm(model):
    class Same(torch.nn.Identity):
        def forward(self, x, hook_normalized=None):
            return x

    model.blocks[1].input_layernorm = Same()


def other_norm(model):
    model.norm = torch.nn.RMSNorm(64, dtype=torch.float64)
    model.norm.forward = lambda x, hook_normalized=None: torch.nn.RMSNorm.forward(model.norm, x)


def narrow_experts(model):
    experts = model.blocks[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[:, :32].detach().clone())
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:, :, :16].detach().clone())


@pytest.mark.parametrize(
    "change",
    [biased_head, scaled_embedding, wrapped_embedding, no_norm, weight_norm_head, turned_head, limited_embedding,
     other_eps_in_one_norm, fewer_experts_in_one_layer, other_norm, narrow_experts],
)  # fmt: skip
def test_what_it_does_not_know_runs_in_the_modules_and_is_named(change):
    model = small_model(dtype=torch.float64)
    assert against_modules(model) == (pytest.approx(0, abs=1e-12), 3)
    change(model)
    assert against_modules(model) == (pytest.approx(0, abs=1e-12), 0)
    row = next(row for row in q.explain(model) if row.operation == "decode")
    assert row.runs == "torch"
    assert row.faster.startswith("cpp: ")


def test_explain_sees_hooks():
    model = small_model()
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    (row,) = (row for row in q.explain(model) if row.operation == "decode")
    assert row.runs == "torch"
    handle.remove()
    (row,) = (row for row in q.explain(model) if row.operation == "decode")
    assert row.runs == "cpp"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_ids_of_any_width(dtype):
    model = small_model(dtype=torch.float64)
    expected, got = (model.step(tokens(2).to(kind), model.new_cache(2)) for kind in (torch.int64, dtype))
    assert torch.equal(expected, got)
    for wrong in (tokens(2).double(), tokens(2) > 3):
        with pytest.raises(ValueError, match="must be integers"):
            as_ids(wrong)


def test_a_cache_of_another_model_is_refused():
    other = small_model(linear_num_value_heads=6).new_cache(2)
    with pytest.raises(ValueError, match="linear_num_value_heads = 6, this one has 4"):
        small_model().step(tokens(1), other)
    cache = small_model().new_cache(2)
    cache.layers = cache.layers[::-1]
    with pytest.raises(ValueError, match="made for a model of other layers or sizes"):
        small_model().step(tokens(1), cache)


def test_rope_that_changes_acts_on_the_next_step():
    model = small_model(dtype=torch.float64)
    assert against_modules(model)[0] < 1e-12
    model.config = model.config.replace(rope_theta=37.0)
    assert against_modules(model) == (pytest.approx(0, abs=1e-12), 3)


def test_rotations_that_others_fetch_meanwhile_stay():
    """Rows at distant positions need several tables, and computing one may evict another."""
    model = small_model(dtype=torch.float64, num_hidden_layers=1, layer_types=("full_attention",), num_experts=0,
                        mtp_num_hidden_layers=0)  # fmt: skip
    ids, mask = tokens(4095, b=2), torch.ones(2, 4095)
    mask[0, :40] = 0
    cache = model.new_cache(2, max_len=5000)
    list(model.prefill(ids, cache, segments=Segments.from_mask(mask)))
    model.step(tokens(1, b=1), model.new_cache(1))
    plan = model.plan_cache.plan
    for place in range(0, 4096, rotations.TABLE):
        plan.rotations.at(model, place)  # as a text decoded from its beginning would
    for _ in range(3):
        (other,) = cache.fork()
        with torch.no_grad():
            expected = model(tokens(1), cache=other).logits[:, -1]
        assert (model.step(tokens(1), cache) - expected).abs().max() < 1e-10


def test_weights_that_are_let_go_are_not_kept(monkeypatch):
    """`.to()` does not hold a second copy of all weights: the plan releases the old ones first."""
    model = small_model()
    model.step(tokens(1), model.new_cache(2))
    assert model.plan_cache.plan is not None
    seen = []
    monkeypatch.setattr(torch.nn.Module, "_apply", lambda self, fn, recurse=True: seen.append(model.plan_cache.plan))
    model.double()
    assert seen == [None]


def test_a_broken_weight_is_refused_at_every_step():
    model = small_model()
    model.blocks[0].mlp.router.weight.data.untyped_storage().resize_(4)
    for _ in range(2):
        with pytest.raises(ValueError, match="fewer than its numbers need"):
            model.step(tokens(1), model.new_cache(2))


@pytest.mark.parametrize("options", [{}, {"history": 4}, {"mtp": True}, {"state_dtype": "bfloat16"}])
def test_a_model_that_is_cast_in_the_middle_of_a_text(options):
    """Decoding continues in the new dtype, in the modules and compiled; earlier tokens cannot be rolled back."""
    model = small_model(dtype=torch.float64, num_experts=0)
    cache = model.new_cache(2, max_len=40, **options)
    list(model.prefill(tokens(7), cache))
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float64, 1e-9)):
        model.step(tokens(1), cache)
        model.to(dtype)
        (other,) = cache.fork()
        with torch.no_grad():
            expected = model(tokens(1), cache=other).logits[:, -1]
        got = model.step(tokens(1), cache)
        assert got.dtype == dtype
        rounded = "state_dtype" in options  # a bf16 state halfway between two numbers may round either way
        assert (got - expected).abs().max() < max(bound, 1e-2 * rounded)
        if "history" in options:
            cache.rollback(1)
            with pytest.raises(ValueError, match="is kept"):
                cache.rollback(1)
            model.step(tokens(1), cache)
