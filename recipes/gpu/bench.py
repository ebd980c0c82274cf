"""What every section of the GPU check works with: jobs, and a model of as many layers as the device has room for."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qwen3next as q
from layers.dispatch.backends import choose_for
from qwen3next.inspect import on_meta
from recipes.measure.measuring import matmul_rate, read_bandwidth

Row = dict[str, Any]
ELEMENT = 2  # bytes of a bf16 number
TRY_OUT = 15 * 2**20  # bytes that count as free on a CPU, where the program is only tried


@dataclass(frozen=True)
class Job:
    """One measurement: its name within the section, and what yields its rows. A failed job does not stop the others."""

    name: str
    run: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Section:
    """Jobs that share a process, and their weight in the division of the time."""

    jobs: "Callable[[Bench], Iterator[Job]]"
    weight: float


@dataclass(frozen=True)
class Settings:
    """What the process of a section is told.

    Attributes:
        can: bytes read and bf16 operations per second, where they are measured already.
    """

    device: str = "cuda"
    preset: str = "qwen3_next_80b_a3b"
    quick: bool = False
    seed: int = 0
    can: dict[str, float] = field(default_factory=dict)


def full_config(settings: Settings) -> q.ModelConfig:
    """The preset without its MTP layer. To try the program, 48 tiny layers with an untied head stand for it."""
    changes: dict[str, Any] = {"mtp_num_hidden_layers": 0, "max_position_embeddings": 2**18}
    if settings.preset == "tiny" and settings.quick:
        changes |= {"num_hidden_layers": 48, "tie_word_embeddings": False}
    return q.presets.ALL[settings.preset](**changes)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; on a CPU a small number, so that the same arithmetic runs."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else TRY_OUT


def layers_that_fit(config: q.ModelConfig, free: int, *, copies: int, margin: float) -> int:
    """How many layers' weights fit, in whole periods of the layers' order (3 Gated DeltaNet, 1 softmax attention).

    Args:
        copies: 1 for the weights, 2 with gradients of the same dtype.
        margin: share of the free bytes that is left to caches and intermediate results.
    Raises: ValueError where not one period fits.
    """
    period = config.full_attention_interval or 1
    one = on_meta(config.replace(num_hidden_layers=period))
    per_period = ELEMENT * sum(p.numel() for p in one.blocks.parameters())
    around = ELEMENT * sum(p.numel() for p in one.parameters()) - per_period
    room = int(free * (1 - margin)) - copies * around
    periods = min(room // (copies * per_period), config.num_hidden_layers // period)
    if periods < 1:
        raise ValueError(
            f"Not even {period} layers of this model fit ({copies * (per_period + around) / 1e9:.1f} GB of "
            f"{free / 1e9:.1f} GB free): choose a smaller one with --preset."
        )
    return periods * period


def build(config: q.ModelConfig, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> q.Qwen3Next:
    """Random weights made on the device in this dtype: nothing passes through fp32 or the CPU's memory."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return q.Qwen3Next(config).eval()
    finally:
        torch.set_default_dtype(before)


class Bench:
    """The device, its measured rates, and the model, which is made at its first use.

    Args:
        ends: `time.monotonic()` at which the section's time is over.
    """

    def __init__(self, settings: Settings, ends: float):
        self.settings, self.ends = settings, ends
        self.device, self.quick = torch.device(settings.device), settings.quick
        self.full = full_config(settings)
        self._can = dict(settings.can)
        self._model: q.Qwen3Next | None = None
        self.model_row: Row = {}

    @property
    def left(self) -> float:
        """Seconds left to the section."""
        return self.ends - time.monotonic()

    def load(self, *, copies: int = 1, margin: float = 0.15) -> Row:
        """Make the model, as large as fits; the row says how large."""
        free, began = free_bytes(self.device), time.monotonic()
        layers = layers_that_fit(self.full, free, copies=copies, margin=margin)
        self._model = build(self.full.replace(num_hidden_layers=layers), self.device, self.settings.seed)
        nbytes = sum(p.nbytes for p in self._model.parameters())
        self.synchronize()
        self.model_row = {
            "what": f"model: {self.settings.preset}, {self.layers}, random weights in bf16",
            "weight bytes": nbytes,
            "bytes free before": free,
            "margin": margin,
            "seconds": time.monotonic() - began,
        }
        return self.model_row

    @property
    def model(self) -> q.Qwen3Next:
        if self._model is None:
            self.load()
        assert self._model is not None
        return self._model

    @property
    def config(self) -> q.ModelConfig:
        """Of the model that was made."""
        return self.model.config

    @property
    def layers(self) -> str:
        """Such as "36 of 48 layers"."""
        return f"{self.config.num_hidden_layers} of {self.full.num_hidden_layers} layers"

    def extrapolated(self, ms: float) -> Row:
        """Time for all layers, in proportion to those that were measured; the head is scaled with them, so slow-sided.

        Empty where all layers were measured.
        """
        n, total = self.config.num_hidden_layers, self.full.num_hidden_layers
        return {} if n == total else {f"ms for {total} layers, extrapolated from {n}": ms * total / n}

    @property
    def can(self) -> dict[str, float]:
        """Bytes read per second and bf16 floating-point operations per second, measured here."""
        if not self._can:
            rate = matmul_rate(torch.bfloat16, self.device)
            self._can = {"read_bytes_per_second": read_bandwidth(self.device), "bfloat16_flops_per_second": rate}
        return self._can

    def ids(self, b: int, t: int) -> Tensor:
        """Random tokens, the same for the same b and t."""
        drawn = torch.Generator().manual_seed(self.settings.seed)
        return torch.randint(self.full.vocab_size, (b, t), generator=drawn).to(self.device)

    def runs(self, *, gradients: bool = False) -> str:
        """Which implementation of each operation runs in the model, with or without gradients."""
        found = {row.operation: row.runs for row in q.explain(self.model)}
        if gradients:
            found.pop("decode", None)
            weight, head_dim = self.model.embed_tokens.weight, self.config.head_dim
            with torch.enable_grad():
                for operation in found:
                    width = head_dim if operation == "attention" else 0
                    found[operation] = choose_for(operation, "auto", weight.device, weight.dtype, head_dim=width)
        return ", ".join(f"{operation} {runs}" for operation, runs in found.items())

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
