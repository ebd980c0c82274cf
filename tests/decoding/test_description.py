"""The description of a model: one entry a kind, every weight named once, and structures that C++ has too."""

import gc
import weakref

import pytest
import torch
from conftest import small_model
from parity import tokens
from test_decode import SHAPES
from torch import nn

import qwen3next as q
from layers.cpp import build, step
from layers.linear import Linear
from qwen3next.decoding import cuda_graph
from qwen3next.decoding.describe_model import Unsupported, describe, describe_mtp
from qwen3next.decoding.description import KINDS, describes
from qwen3next.decoding.why_not import why_not


def matrices(structure, prefix=""):
    """Paths of all matrices of a C structure."""
    for name, kind in structure._fields_:
        if kind is step.Mat:
            yield prefix + name
        elif hasattr(kind, "_fields_"):
            yield from matrices(kind, f"{prefix}{name}.")


def test_the_entries_fill_every_field_and_name_every_weight():
    """All shapes of models together use each matrix of the structures; each model uses each of its weights once."""
    used = set()
    for shape in SHAPES.values():
        model = small_model(**shape)
        found = list(describe(model).weights)
        used |= {held.field for held in found}
        parts = [model.embed_tokens, model.norm, model.lm_head, *model.blocks]
        weights = [id(x) for part in parts for x in part.parameters()]
        assert sorted(id(held.tensor) for held in found) == sorted(weights)
        if model.mtp is not None:
            ahead = list(describe_mtp(model).weights)
            used |= {held.field for held in ahead}
            weights = [id(x) for part in (model.embed_tokens, model.lm_head, model.mtp) for x in part.parameters()]
            assert sorted(id(held.tensor) for held in ahead) == sorted(weights)
    # In no model here: the bias of a gate, and of the MTP layer's first product.
    absent = {"attention.gate_bias", "fc_bias"}
    assert set(matrices(step.Layer)) | set(matrices(step.EmbeddingAndHead)) == used | absent


@pytest.mark.skipif(build.missing() is not None, reason=f"compiled code cannot run: {build.missing()}")
def test_structures_are_as_large_as_in_cpp():
    library = step.kernels()
    assert library.structure_size(len(step.STRUCTURES)) == 0
    assert all(library.structure_size(i) > 0 for i in range(len(step.STRUCTURES)))


@pytest.mark.parametrize("structure", step.STRUCTURES, ids=lambda structure: structure.__name__)
def test_a_field_that_a_structure_does_not_have_is_refused(structure):
    """ctypes alone would accept the name and leave the field that C++ reads at zero."""
    with pytest.raises(AttributeError):
        structure(taps=4)


class Quarter(Linear):
    """A weight of a kind of its own."""


def test_a_kind_that_is_registered_is_known_from_then_on():
    model = small_model()
    model.blocks[3].self_attn.o_proj = Quarter(128, 64, bias=False)
    with pytest.raises(Unsupported, match=r"blocks.3.self_attn.o_proj is a Quarter, which it does not know"):
        describe(model)
    linear = KINDS[Linear]
    describes(Quarter, roles=linear.roles)(linear.describe)
    try:
        assert len(describe(model).layers) == 4
    finally:
        del KINDS[Quarter]


def test_reasons_name_the_module():
    model = small_model()
    model.blocks[0].mlp.experts.extra = nn.Parameter(torch.zeros(3))
    assert why_not(model, "cpp") == "blocks.0.mlp.experts.extra is a weight that it does not know"
    model = small_model()
    model.blocks[1].input_layernorm = nn.Identity()
    assert why_not(model, "cpp") == "blocks.1.input_layernorm is a Identity, not a norm"
    model = small_model()
    model.lm_head = nn.Linear(64, 97)
    assert why_not(model, "cpp") == "lm_head.bias is a weight that it does not know"
    model = q.Qwen3Next(q.presets.tiny(linear_output_gate="sigmoid", mtp_num_hidden_layers=0))
    assert why_not(model, "cpp").endswith("it is a variant of Gated DeltaNet")


def test_a_graph_goes_with_its_cache():
    """It lies in a map beside the cache, which it must not keep alive."""
    model = small_model()
    cache, other = model.new_cache(2), model.new_cache(2)
    graph = cuda_graph.GraphStep(model, cache, model.plan_cache.current(model))
    cuda_graph._set_graph(cache, graph)
    assert cuda_graph.graph_of(cache) is graph
    assert cuda_graph.graph_of(other) is None
    gone, before = weakref.ref(graph), len(cuda_graph._graphs)
    model.step(tokens(1), cache)
    del cache, graph
    gc.collect()
    assert gone() is None
    assert len(cuda_graph._graphs) == before - 1
