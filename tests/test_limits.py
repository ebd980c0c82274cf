"""Every public function with every argument at, below and above its limits gives a result or a clear error of ours."""

import inspect
import itertools
import os
import subprocess
import sys
import tempfile
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from chatting import PLAIN, tokenizer
from conftest import small_config, small_model
from jaxtyping import AbstractArray
from torch import Tensor

import qwen3next as q
from layers.segments import Segments
from qwen3next.chat.template import ChatTemplate

OURS = (str(Path(q.__file__).parent), str(Path(q.__file__).parent.parent / "layers"))
HERE = Path(__file__).parent
CODER = tokenizer(ascii_only=True)
MODEL = small_model(
    num_hidden_layers=2, layer_types=("linear_attention", "full_attention"), vocab_size=CODER.get_vocab_size()
)
IDS = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))

INTS = (-(2**63), -1, 0, 1, 2, 3, 7, 64, 100, 10_000)
FLOATS = (-1e30, -1.0, -0.0, 0.0, 1e-40, 1e-9, 0.5, 1.0, 1.5, 1e30, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "nonsense", "a\0b", "auto", "cpu", "float32", "torch", "1GiB", "-1GiB", "*", "é" * 300)
TENSORS = (
    IDS,
    IDS[:, :0],
    IDS[:0],
    IDS[:1],
    IDS[0],
    IDS[None],
    IDS[0, 0],
    IDS.int(),
    IDS.to(torch.uint8),
    IDS.float(),
    IDS.bool(),
    IDS - 5,
    IDS + 90,
    IDS + 2**40,
    IDS.expand(2, 9).T.contiguous().T,
    torch.full((2, 9), torch.nan),
    torch.full((2, 9), -torch.inf),
    torch.randn(2, CODER.get_vocab_size()),
)
SEGMENTS = (
    None,
    Segments.full(IDS),
    Segments.full(IDS[:1]),
    Segments.from_mask(torch.zeros(2, 9)),
    Segments.from_mask(torch.ones(2, 9).tril(3)),
    Segments.from_mask(torch.ones(2, 9).triu(1)),
    Segments.from_mask(torch.tensor([[1, 0] * 4 + [1]] * 2)),
    Segments.from_lengths([[4, 5], [9]]),
    Segments.from_lengths([[1] * 9, []]),
)


def values_of(annotation: object) -> list[object]:
    """Values at, below and above the limits for an annotation; empty for types without limits."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [value for part in typing.get_args(annotation) for value in values_of(part)]
    known: dict[object, tuple[object, ...]] = {
        bool: (False, True),
        int: INTS,
        float: FLOATS,
        str: TEXTS,
        type(None): (None,),
        torch.dtype: (torch.float16, torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64),
        Segments: SEGMENTS,
    }
    if typing.get_origin(annotation) in (Sequence, tuple) and typing.get_args(annotation)[0] is int:
        return [[], [0], [-1], [3, 3], [0, 1], [10_000], [2**62]]
    if isinstance(annotation, type) and issubclass(annotation, (Tensor, AbstractArray)):
        return list(TENSORS)
    return list(known.get(annotation, ()))


def cache(**options: object) -> q.HybridCache:
    made = MODEL.new_cache(2, 64, **({"history": 4} | options))
    for _ in MODEL.prefill(IDS, made):
        pass
    made.snapshot("here")
    return made


def drawn(x: object) -> object:
    """Take up to three items of an iterator, so that its code runs; other values are returned unchanged."""
    return list(itertools.islice(x, 3)) if isinstance(x, Iterator) or hasattr(x, "__next__") else x


def calls(folder: Path) -> dict[str, tuple[Callable, dict[str, object]]]:
    """Every public function and method, with valid arguments."""
    MODEL.save_pretrained(folder / "m")
    cache().save(folder / "cache")
    template = ChatTemplate(PLAIN)
    one = torch.tensor([3, 4])
    return {
        "sample": (q.sample, {"logits": torch.randn(2, 5)}),
        "stream": (q.stream, {"model": MODEL, "input_ids": IDS, "max_new_tokens": 2}),
        "explain": (q.explain, {"model": MODEL}),
        "load": (q.load, {"path": folder / "m"}),
        "save": (q.save, {"model": MODEL, "folder": folder / "saved"}),
        "HybridCache.save": (lambda path: cache().save(path), {"path": folder / "again"}),
        "SamplingRules": (q.SamplingRules, {}),
        "Layout": (lambda **o: q.save(MODEL, folder / "saved", layout=q.Layout(**o)), {}),
        "forward": (lambda **o: MODEL(**o), {"input_ids": IDS}),
        "residual": (MODEL.residual, {"stop_at_layer": 1, "input_ids": IDS}),
        "step": (lambda input_ids: MODEL.step(input_ids, cache()), {"input_ids": IDS[:, :1]}),
        "loss": (MODEL.loss, {"input_ids": IDS}),
        "new_cache": (MODEL.new_cache, {}),
        "prefill": (lambda **o: MODEL.prefill(cache=MODEL.new_cache(2, 64), **o), {"input_ids": IDS}),
        "token_losses": (MODEL.token_losses, {"input_ids": IDS}),
        "draft": (lambda token: MODEL.draft(cache(mtp=True), token), {"token": one}),
        "extend_context": (lambda factor: small_model().extend_context(factor), {"factor": 2.0}),
        "set_backend": (small_model().set_backend, {"operation": "decode", "name": "auto"}),
        "rollback": (lambda tokens: cache().rollback(tokens), {"tokens": 1}),
        "fork": (lambda n: cache().fork(n), {"n": 1}),
        "select": (lambda rows: cache().select(rows), {"rows": [0]}),
        "restore": (lambda name: cache().restore(name), {"name": "here"}),
        "snapshot": (lambda name: cache().snapshot(name), {"name": "there"}),
        "rewind_to": (lambda ids: cache().select([0]).rewind_to(ids), {"ids": IDS[0].tolist()}),
        "presets.named": (q.presets.named, {"name": "tiny"}),
        "PrefixStore.add": (lambda rows: q.PrefixStore(MODEL).add(cache().select(rows)), {"rows": [0]}),
        "HybridCache.load": (q.HybridCache.load, {"path": folder / "cache", "model": MODEL}),
        "HybridCache.estimate": (q.HybridCache.estimate, {"config": MODEL.config, "tokens": 5}),
        "PrefixStore": (q.PrefixStore, {"model": MODEL}),
        "PrefixStore.prefill": (lambda **o: list(q.PrefixStore(MODEL).prefill(**o)), {"ids": IDS[0]}),
        "PrefixStore.match": (lambda ids: q.PrefixStore(MODEL).match(ids), {"ids": IDS[0]}),
        "Document": (
            lambda **o: list(q.Document(MODEL, CODER, **o).answer("why?", max_new_tokens=2)),
            {"text": "A text.", "template": template},
        ),
        "Document.answer": (
            lambda **o: list(
                q.Document(MODEL, CODER, "A text.", template=template).answer(**{"max_new_tokens": 2} | o)
            ),
            {"question": "why?"},
        ),
    }


SIGNATURES: dict[str, Callable] = {
    "Layout": q.Layout,
    "forward": q.Qwen3Next.forward,
    "step": q.Qwen3Next.step,
    "prefill": q.Qwen3Next.prefill,
    "draft": q.Qwen3Next.draft,
    "extend_context": q.Qwen3Next.extend_context,
    "rollback": q.HybridCache.rollback,
    "fork": q.HybridCache.fork,
    "select": q.HybridCache.select,
    "restore": q.HybridCache.restore,
    "snapshot": q.HybridCache.snapshot,
    "rewind_to": q.HybridCache.rewind_to,
    "PrefixStore.add": q.HybridCache.select,  # of the rows that are added
    "HybridCache.save": q.HybridCache.save,
    "PrefixStore.prefill": q.PrefixStore.prefill,
    "PrefixStore.match": q.PrefixStore.match,
    "Document": q.Document,
    "Document.answer": q.Document.answer,
}
# (function, argument) whose limit is the machine's memory
LARGE = {("new_cache", "batch"), ("fork", "n"), ("new_cache", "max_len"), ("HybridCache.load", "max_len")}


def complaint(call: Callable, arguments: dict[str, object]) -> str:
    """The defect of a call's result; "" for a result or a clear error of ours."""
    try:
        drawn(call(**arguments))
    except (ValueError, RuntimeError, TypeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not where.startswith(OURS):
            return f"{type(error).__name__} of {Path(where).name}: {str(error).splitlines()[0][:150]}"
        return "" if "\n" not in str(error) and str(error).rstrip().endswith((".", "?", ")")) else f"says {error}"
    except Exception as error:  # any error
        return f"{type(error).__name__}: {str(error)[:150]}"
    return ""


def arguments(folder: Path) -> Iterator[str]:
    """Values of arguments of public functions whose calls end with a defect."""
    for name, (call, base) in calls(folder).items():
        assert not complaint(call, base), name
        told = SIGNATURES.get(name, call)
        for argument, parameter in inspect.signature(told).parameters.items():
            for value in values_of(parameter.annotation):
                if (name, argument) in LARGE and isinstance(value, int) and value > 100:
                    continue
                if found := complaint(call, base | {argument: value}):
                    shown = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)[:60]
                    yield f"{name}({argument}={shown}): {found}"


def configurations() -> Iterator[str]:
    """Fields whose accepted values cannot be built and run, or that are refused without a clear error."""

    def built(**changes: object) -> None:
        model = q.Qwen3Next(small_config(**({"num_hidden_layers": 2, "full_attention_interval": 2} | changes)))
        ids = torch.zeros(1, 5, dtype=torch.long)
        model(ids)
        model.loss(ids)
        q.generate(model, ids, max_new_tokens=2)

    for name, kind in typing.get_type_hints(q.ModelConfig).items():
        for value in values_of(kind):
            if (not isinstance(value, int) or value < 64) and (found := complaint(built, {name: value})):
                yield f"{name}={value!r}: {found}"


def test_every_cell_is_right_or_refused(tmp_path):
    """In a separate process without signature checks, because users have no such checks either."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": paths}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    assert not process.stdout, process.stdout


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        print(*arguments(Path(made)), *configurations(), sep="\n", end="")
