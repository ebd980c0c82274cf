"""Compiled steps of decoding, held to the modules: values, caches, what is noted, and when the modules run instead."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from conftest import small_model
from parity import tokens

import qwen3next as q
from layers.gated_deltanet import DeltaNetState
from layers.native import build
from layers.segments import Segments
from qwen3next import decode
from qwen3next.decode import MOST_TOKENS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"compiled code cannot run: {build.missing()}")

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
    """Logits and caches by modules and by compiled code, over the same prompts and steps."""
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
    """Largest difference of logits, and of states, keys and values."""
    (a, one), (b, two) = found
    parts = []
    for x, y in zip(one.layers, two.layers, strict=True):
        if isinstance(x, DeltaNetState):
            parts += [(x.conv, y.conv), (x.memory, y.memory)]
        else:
            parts += zip(x.read(0, min(one.lengths)), y.read(0, min(one.lengths)), strict=True)
    return (a - b).abs().max().item(), max((x.double() - y.double()).abs().max().item() for x, y in parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_in_fp64(shape):
    """Steps of one and of several tokens, rows of one length and of several, a context that spans several pieces."""
    model = small_model(dtype=torch.float64, **SHAPES[shape])
    assert decode.why_not(model) is None
    for lengths in ((70,), (9, 9), (3, 40, 1)):
        steps = [t for t in (1, 1, 2, 5, 1) if t * len(lengths) <= MOST_TOKENS]
        assert max(apart(both(model, lengths, steps))) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.bfloat16, 0.5)])
def test_values_in_less(dtype, bound):
    """As far apart as rounding is: logits of order 1, whose bf16 ulp is 2^-7, after four layers that amplify it."""
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
    """Rounded to the same places; a number on the edge between two may fall to either side."""
    model = small_model(dtype=torch.float64)
    logits, states = apart(both(model, (40, 40), [1, 1, 2], **options))
    assert max(logits, states) < (1e-12 if options.keys() & {"history", "mtp"} else 1e-2)
    if options == {"history": 4}:
        for cache in (found[1] for found in both(model, (40,), [1] * 6, **options)):
            cache.rollback(3)
            assert cache.lengths == (43,)


def test_long_contexts_and_shared_beginnings():
    """A context of many pieces, in parts of which several belong to others too."""
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

    def run(self, *args):
        calls.append(1)
        return real(self, *args)

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
        model.step(tokens(MOST_TOKENS), cache)  # 16 tokens in all
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
    """Hooks, and what is put in a module's place without a word, at the very next step."""
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
    """Two Python threads over one model, each with a cache of its own."""
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
    """A cache folder where nothing was compiled yet."""
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
