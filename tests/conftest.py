"""Checks shapes in signatures in every test; defines small, seeded test models with large enough weights.

With the usual N(0, 0.02) a random model's layers barely change the residual stream, and a wrong layer would pass.
"""

import os
import signal
import sys
from collections.abc import Iterator

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("QWEN3NEXT_TUNED", "0")  # what `qwen3next tune` has measured on this machine

with install_import_hook(["layers", "qwen3next"], "beartype.beartype"):
    import qwen3next as q  # and layers, before torch runs anything: QWEN3NEXT_CPU bounds it

# isort: split

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def small_config(**changes: object) -> q.ModelConfig:
    """Different numbers of key, value and query heads and different head sizes, so that swapped axes fail."""
    values = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 10_000.0,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 24,
    }
    return q.ModelConfig(**(values | changes))  # type: ignore[arg-type]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> q.Qwen3Next:
    """A random model with perturbed norms and a standard deviation of 0.06 for linear maps; logits of order 1."""
    torch.manual_seed(seed)
    model = q.Qwen3Next(small_config(**({"initializer_range": 0.06} | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.lm_head.weight.normal_(0, 0.15)
    return model.to(dtype).eval()


@pytest.fixture
def model64() -> q.Qwen3Next:
    """A model in fp64, where rounding is negligible, so that any difference is an error."""
    return small_model(dtype=torch.float64)


WITH_OUR_CLASSES = ("hf", "tools")  # folders of tests whose Auto classes give ours, as does the page about them


@pytest.fixture(autouse=True, scope="module")
def auto_classes_of_a_file(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once qwen3next.hf is imported, Auto classes give ours: elsewhere that would compare our model with itself."""
    ours = request.path.parent.name in WITH_OUR_CLASSES or request.path.name == "test_docs.py"
    yield from _without_our_classes(not ours)


@pytest.fixture(autouse=True)
def auto_classes(request: pytest.FixtureRequest) -> Iterator[None]:
    """As above, where a test of another file has imported it, and for pages but the one about transformers."""
    ours = request.path.parent.name in WITH_OUR_CLASSES or "hf.md" in request.node.name
    yield from _without_our_classes(not ours)


def _without_our_classes(wanted: bool) -> Iterator[None]:
    if not wanted or "qwen3next.hf" not in sys.modules:
        yield
        return
    from transformers import AutoModel, AutoModelForCausalLM

    registered = [kind._model_mapping._extra_content for kind in (AutoModel, AutoModelForCausalLM)]
    kept = [dict(content) for content in registered]
    for content in registered:
        content.clear()
    yield
    for content, before in zip(registered, kept, strict=True):
        content.update(before)
