"""A whole decoding step of Triton kernels, interpreted, against the modules; how many kernels it launches; that each
compiles for the GPUs in use."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import interpreted  # noqa: F401  # mends bf16
from conftest import small_model
from launches import BOTH, official, step_on_meta
from parity import tokens
from test_decode import SHAPES, apart

import layers.dispatch.backends as backends
from qwen3next.decoding import token_step
from qwen3next.decoding.cuda_graph import graph_of

pytestmark = pytest.mark.oracle

# Of the forms that tests/decoding runs; an interpreted step of each takes seconds.
FORMS = ("hybrid", "odd sizes", "two taps", "not renormalised", "dense and sparse", "headwise gate", "no gate, biases")


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch):
    """Allow the graph and its kernels on any device; only CUDA captures them."""
    free = [backends.Implementation(i.name, i.why) if i.name == "graph" else i for i in backends.OPERATIONS["decode"]]
    monkeypatch.setitem(backends.OPERATIONS, "decode", tuple(free))
    monkeypatch.setattr(token_step, "one_token_kernels", lambda *_: None)


def both(model, n, steps, *, batch=1):
    """Logits and caches of the modules and of the kernels after the same prompt, for `steps` tokens."""
    found = []
    for backend in ("torch", "graph"):
        model.set_backend("decode", backend)
        cache = model.new_cache(batch, max_len=80)
        list(model.prefill(tokens(n, b=batch), cache))
        logits = [model.step(tokens(i, b=batch)[:, :1], cache) for i in range(1, steps + 1)]
        found.append((torch.stack(logits), cache))
    assert graph_of(cache).tokens.backend == "triton"
    return found


@pytest.mark.parametrize("shape", FORMS)
def test_values_and_caches(shape):
    """Two rows, three tokens in sequence, in fp32: logits of order 1, states, keys and values."""
    model = small_model(**SHAPES[shape])
    assert token_step.unknown_form(model) is None
    assert max(apart(both(model, 20, 3, batch=2))) < 5e-5


def test_values_in_bf16():
    """No further from the modules in fp64 than the modules in bf16 are, but for chance."""
    exact = small_model(dtype=torch.float64)
    exact.set_backend("decode", "torch")
    model = small_model(dtype=torch.bfloat16)
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    (modules, _), (kernels, _) = both(model, 20, 4, batch=2)
    cache = exact.new_cache(2, max_len=80)
    list(exact.prefill(tokens(20, b=2), cache))
    truth = torch.stack([exact.step(tokens(i, b=2)[:, :1], cache) for i in range(1, 5)])
    errors = [((x.double() - truth).norm() / truth.norm()).item() for x in (kernels, modules)]
    assert errors[0] < 1.3 * errors[1]
    assert errors[1] < 0.1


def test_forks_and_snapshots():
    """A fork and a snapshot between two steps, taken from states that are still in the graph's memory."""
    model = small_model()
    found = []
    for backend in ("torch", "graph"):
        model.set_backend("decode", backend)
        cache = model.new_cache(max_len=80)
        list(model.prefill(tokens(20, b=1), cache))
        logits = [model.step(tokens(1, b=1), cache)]
        cache.snapshot("here")
        other = cache.fork()[0]
        logits += [model.step(tokens(n, b=1)[:, :1], cache) for n in (2, 3)]
        logits += [model.step(tokens(n, b=1)[:, :1], other) for n in (4, 5)]
        cache.restore("here")
        logits += [model.step(tokens(n, b=1)[:, :1], cache) for n in (4, 5)]
        found.append(torch.stack(logits))
    torch.testing.assert_close(*found, rtol=0, atol=5e-5)
    assert torch.equal(found[1][3:5], found[1][5:7])


def test_more_rows_than_the_kernels_take_run_in_the_modules():
    model = small_model()
    model.set_backend("decode", "graph")
    cache = model.new_cache(17, max_len=9)
    model.step(tokens(1, b=17), cache)
    assert graph_of(cache).tokens is None


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("kind, ours, products", [("linear_attention", 7, 6), ("full_attention", 8, 6)])
def test_launches_of_a_layer_of_the_official_form(kind, ours, products, batch):
    """At most 20 kernels a layer; what stands around the layers is the embedding, the last norm and the head.

    A product counts as one; cuBLAS may split one row's into two. The step's counters are two more for all layers.
    """
    kernels, operations = step_on_meta(official(kind), torch.bfloat16, batch)
    assert len(kernels) - 1 == ours
    counts = Counter(name.split(".")[0] for name in operations)
    assert counts == {"embedding": 1, "mm": products + 1}
    assert ours + 2 * products <= 20


def test_no_operation_reads_a_value_on_the_host():
    """On meta tensors, which have no values: a step of both kinds of layers runs, so that none was asked for."""
    kernels, _ = step_on_meta(official(*BOTH), torch.bfloat16, 2)
    assert len(kernels) == 16


ARCHS = (80, 90, 100)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may take
SMALLEST = 99 * 1024  # on GPUs of compute capability 8.6 and 8.9


def test_every_kernel_compiles_for_the_gpus_in_use():
    """By Triton and the ptxas in its wheel: at the official form without spills and within shared memory; and the
    kernels of all other forms, for one GPU."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = script.parent.parent.parent
    folders = (root, script.parent, root / "tests", root / "tests" / "decoding")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    command = [sys.executable, str(script), *map(str, ARCHS)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    print(out.stdout)
    assert {row["arch"] for row in rows} == set(ARCHS)
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}
    assert len({row["kernel"] for row in rows}) == 15
    assert len([row for row in rows if row["form"] != "official"]) > 20
    for row in rows:
        assert not row["spills"] or row["form"] != "official", row
        assert row["registers"] * row["warps"] * 32 <= 65_536, row
        assert row["shared"] <= min(SMALLEST, SHARED[row["arch"]]), row
