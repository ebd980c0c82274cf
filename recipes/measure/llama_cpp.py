"""llama.cpp beside ours in `recipes.benchmark`: by its Python bindings or its `llama-bench`, where one is found.

The bindings run in this process and their logits are compared with ours before timing. `llama-bench` is started for
each repetition and reports its own time, so that loading the file does not count.
"""

import ctypes
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3next.checkpoints.convert import convert
from qwen3next.checkpoints.gguf.write import to_gguf
from qwen3next.config import ModelConfig

Side = Callable[[], object]
NAME = "llama.cpp"
BATCH = 2048  # tokens of one call, llama.cpp's own default
PREFILL, DECODE = re.compile(r"prefill 1 x (\d+)$"), re.compile(r"decode 1 x 1 after (\d+)$")


def found() -> str | None:
    """ "bindings" or "llama-bench": what is used here; None if neither works."""
    if _broken() is None:
        return "bindings"
    return "llama-bench" if shutil.which("llama-bench") else None


@cache
def _broken() -> str | None:
    """Why the bindings cannot be imported, or None."""
    try:
        importlib.import_module("llama_cpp")
    except Exception as error:  # they load a library, which may fail in any way
        return str(error)
    return None


def why_not() -> str:
    """Why llama.cpp is not measured, in a sentence."""
    server = " (llama-server alone cannot time a prompt of given tokens)" if shutil.which("llama-server") else ""
    installed = importlib.util.find_spec("llama_cpp") is not None
    broken = f"; its bindings are installed but cannot be imported ({_broken()})" if installed else ""
    return f"llama.cpp was not found{server}{broken}: pip install llama-cpp-python, or put llama-bench on the PATH"


def write_gguf(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint in `folder` as the GGUF file `path`, its weights rounded as `q.load` rounds them for ours.

    Raises: ValueError for a checkpoint that the benchmark cannot compare.
    """
    config = ModelConfig.load(folder)
    if config.model_type != "qwen3_next" or not config.num_experts or config.mtp_num_hidden_layers:
        raise ValueError(
            f"{folder} cannot be written for llama.cpp here: it takes qwen3_next with experts, without MTP."
        )
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise ValueError("llama.cpp has one width for the key and value heads of Gated DeltaNet: make them equal.")
    with tempfile.TemporaryDirectory() as temporary:
        rounded = Path(temporary) / "model"
        convert(folder, rounded, dtype=dtype)
        to_gguf(rounded, path, kind={torch.float32: "f32", torch.bfloat16: "bf16"}[dtype])


class LlamaCpp:
    """The model of a folder in llama.cpp.

    Attributes:
        how: as `found`.
    """

    def __init__(self, folder: Path, dtype: str, *, threads: int, steps: int):
        self.how, self.dtype, self.threads, self.steps = found(), dtype, threads, steps
        self.path = folder.parent / f"{dtype}.gguf"
        write_gguf(folder, self.path, getattr(torch, dtype))
        self.bindings = Bindings(self.path, dtype, threads) if self.how == "bindings" else None

    @property
    def runs(self) -> str:
        """What the row says ran."""
        return f"llama.cpp by its {self.how}, cache in {'f32' if self.dtype == 'float32' else 'f16'}"

    def sides(self, what: str) -> dict[str, Side]:
        """The function to time for a row, by name; none for rows that it has no equal of."""
        if prompt := PREFILL.match(what):
            return {NAME: self._prefill(int(prompt[1]))}
        if context := DECODE.match(what):
            return {NAME: self._decode(int(context[1]))}
        return {}

    def _prefill(self, tokens: int) -> Side:
        if self.bindings is None:
            return lambda: self._bench("-p", str(tokens), "-n", "0")
        bindings, ids = self.bindings, [1] * tokens
        context = bindings.context(tokens)
        return lambda: bindings.evaluate(context, ids, fresh=True)

    def _decode(self, past: int) -> Side:
        if self.bindings is None:
            return lambda: self._bench("-p", "0", "-n", str(self.steps), "-d", str(past))
        bindings, steps = self.bindings, self.steps
        context = bindings.context(past + 100 * steps)
        bindings.evaluate(context, [1] * past, fresh=True)

        def run() -> None:
            for _ in range(steps):
                bindings.evaluate(context, [1])

        return run

    def _bench(self, *sizes: str) -> float:
        """Seconds of one repetition, by llama-bench's own clock. Raises: RuntimeError if it fails."""
        kind = "f32" if self.dtype == "float32" else "f16"
        command = ["llama-bench", "-m", str(self.path), "-t", str(self.threads), "-r", "1", "-ngl", "0", "-o", "json"]
        done = subprocess.run(
            [*command, "-ctk", kind, "-ctv", kind, *sizes], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"llama-bench failed ({said}): leave it out with --llama-cpp no.")
        return json.loads(done.stdout)[0]["avg_ns"] / 1e9


class Bindings:
    """llama.cpp's C interface, as the package llama_cpp gives it."""

    def __init__(self, path: Path, dtype: str, threads: int):
        import llama_cpp

        self.api: Any = llama_cpp
        self.exact, self.threads = dtype == "float32", threads
        self._open: Any = None
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it later
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError("llama.cpp cannot read the file that was written for it: leave it out, --llama-cpp no.")

    def context(self, room: int) -> Any:
        """A context for so many tokens; the one before it is freed."""
        if self._open:
            self.api.llama_free(self._open)
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_batch = room, BATCH
        options.n_threads = options.n_threads_batch = self.threads
        if self.exact:
            options.type_k = options.type_v = self.api.GGML_TYPE_F32
        self._open = self.api.llama_init_from_model(self.model, options)
        if not self._open:
            raise RuntimeError(f"llama.cpp has no context of {room} tokens here: leave it out with --llama-cpp no.")
        return self._open

    def evaluate(self, context: Any, ids: Sequence[int], *, fresh: bool = False) -> None:
        """Run tokens behind those that the context holds, or in its `fresh` state; logits of the last alone."""
        if fresh:
            self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            tokens = (ctypes.c_int32 * len(part))(*part)  # named, because the batch has only its address
            if self.api.llama_decode(context, self.api.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama.cpp could not run the tokens: leave it out with --llama-cpp no.")

    def logits(self, ids: Sequence[int], vocabulary: int) -> Tensor:
        """(vocabulary) logits after these tokens, fp32."""
        context = self.context(len(ids))
        self.evaluate(context, ids)
        row = self.api.llama_get_logits_ith(context, -1)
        return torch.tensor(row[:vocabulary])
