"""The step that CUDA captures, run on the CPU, against the modules: values, caches, and when the modules run instead.

Every test runs twice: with the modules captured, and with the operations of `TokenStep`, by their definitions in torch.
tests/kernels/ runs it with the Triton kernels. Capturing needs a device (tests/gpu/test_gpu_decoding.py); the "meta"
device shows that the step never waits for a device.
"""

import copy
import pickle
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from conftest import small_config, small_model
from parity import tokens
from test_decode import SHAPES, apart

import layers.dispatch.backends as backends
import qwen3next as q
from layers.gated_deltanet import DeltaNetState
from layers.segments import Segments
from layers.state.kv_cache import KVCache
from qwen3next.decoding import cuda_graph
from qwen3next.decoding.cuda_graph import GraphStep, graph_of
from qwen3next.decoding.graph_states import LentState, Loan
from qwen3next.decoding.guard import Guard
from qwen3next.decoding.token_step import TokenStep, unknown_form
from qwen3next.decoding.why_not import why_not

pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True, params=["modules", "token step"])
def steps(monkeypatch, request):
    """Allow the graph on any device, and count its steps."""
    if request.param == "token step":
        monkeypatch.setattr(cuda_graph, "why_not_kernels", lambda model, *_: unknown_form(model))
        monkeypatch.setattr(cuda_graph, "TokenStep", lambda model, _: TokenStep(model, "torch"))
    free = [backends.Implementation(i.name, i.why) if i.name == "graph" else i for i in backends.OPERATIONS["decode"]]
    monkeypatch.setitem(backends.OPERATIONS, "decode", tuple(free))
    calls, real = [], GraphStep.run

    def run(self, *args):
        calls.append(1)
        return real(self, *args)

    monkeypatch.setattr(GraphStep, "run", run)
    return calls


def both(model, lengths, n, **options):
    """Logits and caches of the modules and of the graph's step, for the same prompts."""
    found = []
    for backend in ("torch", "graph"):
        model.set_backend("decode", backend)
        cache = model.new_cache(len(lengths), max_len=700, **options)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        list(model.prefill(tokens(max(lengths), b=len(lengths)), cache, segments=Segments.from_mask(mask)))
        found.append((torch.stack([model.step(tokens(i, b=len(lengths))[:, :1], cache) for i in range(1, n)]), cache))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_caches_in_fp64(shape, steps):
    """Rows of equal and unequal lengths."""
    model = small_model(dtype=torch.float64, **SHAPES[shape])
    for lengths in ((70,), (9, 9), (3, 40, 1)):
        found = both(model, lengths, 7)
        assert max(apart(found)) < 1e-11
        assert found[0][1].lengths == found[1][1].lengths
        assert torch.equal(found[0][1].tokens, found[1][1].tokens)
    assert len(steps) == 18


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-5), (torch.bfloat16, 0.5)])
def test_values_in_less(dtype, bound):
    """As in test_decode.py: equal up to rounding."""
    assert max(apart(both(small_model(dtype=dtype), (70,), 6))) < bound


@pytest.mark.parametrize(
    "options", [{"kv_dtype": "float32"}, {"state_dtype": "bfloat16"}, {"mtp": True}], ids=lambda x: next(iter(x))
)
def test_caches_of_every_kind(options):
    found = both(small_model(dtype=torch.float64), (40, 40), 5, **options)
    assert max(apart(found)) < (1e-11 if "mtp" in options else 1e-2)
    if "mtp" in options:
        assert torch.allclose(found[0][1].mtp.k, found[1][1].mtp.k)


def test_a_buffer_that_grows_is_bound_anew(steps):
    model = small_model(dtype=torch.float64)
    found = both(model, (250,), 40)
    assert max(apart(found)) < 1e-11
    assert len(steps) == 39


def test_forks_snapshots_and_rows_go_on_independently(steps):
    """A step never writes into memory of another cache, and continues from any state that its cache was set to."""
    model, ids = small_model(dtype=torch.float64), tokens(20, b=2)

    def expected(*parts):
        with torch.no_grad():
            return model(torch.cat(parts, dim=1)).logits[:, -1]

    model.set_backend("decode", "graph")
    cache = model.new_cache(2, max_len=60)
    list(model.prefill(ids, cache))
    a, b, c = (tokens(n)[:, :1] for n in (1, 2, 3))
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(model.step(a, cache), expected(ids, a), **close)
    cache.snapshot("here")
    fork = cache.fork()[0]
    assert graph_of(fork) is None
    for _ in range(2):
        torch.testing.assert_close(model.step(b, cache), expected(ids, a, b), **close)
        torch.testing.assert_close(model.step(c, cache), expected(ids, a, b, c), **close)
        torch.testing.assert_close(model.step(c, fork), expected(ids, a, c), **close)
        cache.restore("here")
        fork = cache.fork()[0]
    rows = cache.select([1, 1])
    torch.testing.assert_close(model.step(b[[1, 1]], rows), expected(ids[[1, 1]], a[[1, 1]], b[[1, 1]]), **close)
    again = copy.deepcopy(fork)
    assert graph_of(again) is None
    torch.testing.assert_close(model.step(b, again), expected(ids, a, b), **close)
    assert len(steps) >= 8


@pytest.fixture
def copies(monkeypatch):
    """Counts copies out of the graph's memory."""
    taken, real = [], Loan.take

    def take(self):
        if not self._taken:
            taken.append(1)
        real(self)

    monkeypatch.setattr(Loan, "take", take)
    return taken


def test_steps_copy_no_state_and_forks_copy_once(copies):
    model = small_model(dtype=torch.float64)
    model.set_backend("decode", "graph")
    cache = model.new_cache(max_len=60)
    for i in range(1, 6):
        model.step(tokens(i, b=1)[:, :1], cache)
    size = cache.nbytes()
    assert not copies
    fork = cache.fork()[0]
    assert copies == [1]
    assert fork.nbytes() == size
    model.step(tokens(6, b=1)[:, :1], cache)
    model.step(tokens(6, b=1)[:, :1], fork)
    assert copies == [1]


def test_a_state_that_is_held_outlives_its_memory(copies):
    """Held unread for several steps, replaced, copied and pickled."""
    model = small_model(dtype=torch.float64)
    model.set_backend("decode", "graph")
    cache = model.new_cache(max_len=60)
    model.step(tokens(1, b=1), cache)
    held, mark = cache.layers[0].share(), cache.fork()[0].layers[0]
    assert isinstance(held, LentState)
    for i in range(2, 5):
        model.step(tokens(i, b=1)[:, :1], cache)
        assert torch.equal(held.recurrent, mark.recurrent)
        assert torch.equal(held.conv, mark.conv)
    unread = cache.layers[0].share()
    expected = cache.fork()[0]
    model.step(tokens(5, b=1)[:, :1], cache)
    model.step(tokens(6, b=1)[:, :1], cache)
    for state in (unread, copy.deepcopy(unread), pickle.loads(pickle.dumps(unread))):
        assert torch.equal(state.recurrent, expected.layers[0].recurrent)
    assert type(copy.deepcopy(unread)) is DeltaNetState

    zeros = torch.zeros_like(unread.recurrent)
    cache.layers[0].recurrent = zeros
    assert torch.equal(cache.layers[0].recurrent, zeros)
    other = cache.fork()[0]
    model.set_backend("decode", "torch")
    logits = model.step(tokens(7, b=1)[:, :1], other)
    model.set_backend("decode", "graph")
    torch.testing.assert_close(model.step(tokens(7, b=1)[:, :1], cache), logits, rtol=0, atol=1e-11)


def test_inference_mode_comes_and_goes():
    model = small_model(dtype=torch.float64)
    found = []
    for backend in ("torch", "graph"):
        model.set_backend("decode", backend)
        with torch.inference_mode():
            cache = model.new_cache(max_len=60)
            logits = [model.step(tokens(n, b=1)[:, :1], cache) for n in (1, 2)]
        logits += [model.step(tokens(n, b=1)[:, :1], cache) for n in (3, 4)]
        with torch.inference_mode():
            logits.append(model.step(tokens(5, b=1)[:, :1], cache))
        found.append(torch.stack(logits))
    assert graph_of(cache) is not None
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


def test_a_cache_file_of_states_in_the_graph_s_memory(tmp_path):
    model = small_model(dtype=torch.float64)
    model.set_backend("decode", "graph")
    cache = model.new_cache(max_len=60)
    for n in (1, 2):
        model.step(tokens(n, b=1)[:, :1], cache)
    cache.save(tmp_path / "cache.safetensors")
    again = type(cache).load(tmp_path / "cache.safetensors", model)
    logits = [model.step(tokens(3, b=1)[:, :1], x) for x in (cache, again)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


def test_a_row_at_rest_keeps_its_state():
    model, found = small_model(dtype=torch.float64), []
    for backend in ("torch", "graph"):
        model.set_backend("decode", backend)
        cache = model.new_cache(2, max_len=60)
        list(model.prefill(tokens(9), cache))
        logits = [model.step(tokens(1), cache)]
        with cache.resting([1]):
            logits.append(model.step(tokens(2)[:, :1], cache))
        logits.append(model.step(tokens(3)[:, :1], cache))
        found.append(torch.stack(logits))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


def test_a_buffer_moves_at_most_twelve_times_up_to_128k():
    """Each move costs a capture. A buffer that lies in shared parts, after a fork, is joined in one move."""
    cpu, moves = torch.device("cpu"), 0
    state = KVCache(1, kv_heads=1, head_dim=2, max_len=2**17, dtype=torch.float32, device=cpu)
    length = 0
    while length < 2**17:
        k, _ = cuda_graph._doubled(state, Segments(1, 1, cpu, None, 1, (length,)))
        assert k.shape[2] == state.capacity > length
        length, moves = state.capacity, moves + 1
    assert moves <= 12
    assert state.capacity == 2**17
    state = state.share(2**16)
    k, _ = cuda_graph._doubled(state, Segments(1, 1, cpu, None, 1, (2**16,)))
    assert 2**16 < k.shape[2] <= 2**17


def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = small_model(dtype=torch.float64)
    model.set_backend("decode", "graph")
    cache = model.new_cache(max_len=60)
    list(model.prefill(tokens(9, b=1), cache))
    model.step(tokens(1, b=1), cache)
    before, real = cache.fork()[0], GraphStep._step

    def fails(self):
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GraphStep, "_step", fails)
        with pytest.raises(KeyboardInterrupt):
            model.step(tokens(2, b=1)[:, :1], cache)
    assert cache.lengths == before.lengths
    logits = [model.step(tokens(3, b=1)[:, :1], x) for x in (cache, before)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


def test_changed_weights_are_seen():
    model = small_model(dtype=torch.float64)
    model.set_backend("decode", "graph")
    cache = model.new_cache(max_len=60)
    model.step(tokens(1, b=1), cache)
    first = graph_of(cache)
    model.step(tokens(1, b=1), cache)
    assert graph_of(cache) is first
    model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}, assign=True)
    fresh = model.new_cache(max_len=60)
    model.step(tokens(1, b=1), fresh)  # checked again, because the cache is another one
    model.step(tokens(1, b=1), cache)
    assert graph_of(cache) is not first


def test_where_somebody_looks_the_modules_run(steps):
    model, seen = small_model(), []
    model.decode_backend = "graph"
    cache = model.new_cache(2, max_len=30)
    model.step(tokens(1), cache)
    handle = model.hook_dict["blocks.2.linear_attn.hook_beta"].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="hooks are attached"):
        model.step(tokens(1), cache)
    model.decode_backend = "auto"
    model.step(tokens(1), cache)
    assert (len(seen), len(steps)) == (1, 1)
    handle.remove()
    model.decode_backend = "graph"
    model.step(tokens(1), cache)
    assert (len(seen), len(steps)) == (1, 2)


def test_it_says_why_not(monkeypatch):
    model = small_model()
    model.set_backend("decode", "graph")
    for options, reason in (({"history": 4}, "without history"), ({"kv_dtype": "int8"}, "in int8")):
        with pytest.raises(RuntimeError, match=f"'graph' backend of decode cannot run here: .*{reason}"):
            model.step(tokens(1), model.new_cache(2, **options))
    model.set_backend("attention", "eager")
    assert "self_attn has a backend chosen by name" in why_not(model, "graph")
    model.blocks[0].mlp.experts = torch.nn.Identity()
    model.blocks[0].mlp.experts.__class__ = type("Odd", (torch.nn.Identity,), {})
    assert "blocks.0.mlp.experts is a Odd" in why_not(model, "graph")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="it is for CUDA, the tensors are on cpu"):
        small_model().set_backend("decode", "graph")
    rows = {row.operation: row for row in q.explain(small_model(), device="cuda", dtype="bfloat16")}
    assert rows["decode"].runs == "graph"
    if find_spec("triton") is None:
        assert "of the modules' own kernels" in rows["decode"].why
        assert "Triton kernels in it: triton is not installed" in rows["decode"].faster
    else:
        assert "of Triton kernels, a few a layer" in rows["decode"].why
    assert "cpp: " in rows["decode"].faster


def test_what_cannot_be_captured_runs_in_the_modules_and_says_so(monkeypatch):
    model = small_model(dtype=torch.float64)

    def refuses(*_args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(GraphStep, "prepare", refuses)
    cache = model.new_cache(2, max_len=30)
    with pytest.warns(UserWarning, match="without a CUDA graph: it could not be captured, as operation not permitted"):
        logits = model.step(tokens(1), cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens(1)).logits[:, -1], rtol=0, atol=1e-11)
    model.step(tokens(1), cache)  # no second attempt and no second warning
    model.set_backend("decode", "graph")
    with pytest.raises(RuntimeError, match="could not be captured"):
        model.step(tokens(1), cache)


@pytest.mark.parametrize("token_step", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_value_is_read_on_the_host(monkeypatch, batch, token_step):
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())  # the meta device has no autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_args: False)
    assert backends.choose("delta_rule", "auto", torch.empty(1, device="meta")) == "chunked"
    with torch.device("meta"), torch.no_grad():
        model = q.Qwen3Next(small_config()).eval()
        cache = model.new_cache(batch, max_len=30)
        step = GraphStep(model, cache, Guard(model))
        step._bind([s.whole(Segments.full(torch.empty(batch, 5))) for s in cache.layers if hasattr(s, "whole")])
        step._step()
    assert step.logits.shape == (batch, model.vocab_size)
