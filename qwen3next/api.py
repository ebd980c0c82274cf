"""The model that people use: the definition (model.py) with decoding, prefill, hooks, choice of backends and saving."""

from collections.abc import Sequence
from pathlib import Path

import torch

from layers.experts.cache import ExpertCache
from layers.rope import Yarn
from qwen3next.backends import Backends
from qwen3next.checkpoints.adapters import Adapters
from qwen3next.checkpoints.group_weights import Rounding
from qwen3next.checkpoints.load import load_as
from qwen3next.checkpoints.save import save
from qwen3next.checkpoints.state_dict_adapter import Layout
from qwen3next.config import ModelConfig
from qwen3next.files.fingerprint import WeightSums
from qwen3next.interp.activation_cache import ActivationCache


class Qwen3Next(Backends):
    """The hybrid language model. Random weights until loaded; `qwen3next.load` opens checkpoints."""

    activation_cache = ActivationCache

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.name_hooks()
        # Set by `load`: the arrangement and folder of the checkpoint.
        self.layout: Layout | None = None
        self.origin: Path | None = None
        self.expert_cache: ExpertCache | None = None  # where routed experts stay in the files,
        self.experts_in = ""  # as they were when it was loaded
        self.rounding: dict[str, Rounding] = {}  # of weights that `load` rounded, by parameter
        self.weight_sums = WeightSums()
        self.live_adapters = ""  # what hooks of adapters add, for the fingerprint
        self._adapters: Adapters | None = None

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters: `load`, `use`, `merge`, `save`."""
        if self._adapters is None:
            self._adapters = Adapters(self)
        return self._adapters

    def extend_context(self, factor: float) -> None:
        """Span RoPE by YaRN for contexts `factor` times as long as in training; 1 takes it back.

        Caches made before are refused from now on. Short contexts lose a little: use the smallest factor that serves.
        """
        yarn = self.config.rope_scaling
        longest = self.config.max_position_embeddings if yarn is None else yarn.original_max_position_embeddings
        scaling = Yarn(factor=factor, original_max_position_embeddings=longest) if factor != 1 else None
        self.config, self._warned_of_length = self.config.replace(rope_scaling=scaling), False

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and safetensors in the released layout, MTP included."""
        save(self, folder)


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    progress: bool = False,
    experts: str = "memory",
    expert_cache: str | int = "2GiB",
    weights: str = "dequantised",
    adapters: Sequence[str | Path] = (),
) -> Qwen3Next:
    """Open a checkpoint folder (or a hub id, where huggingface_hub can reach it), streamed tensor by tensor.

    Memory at the peak is that of the model and one tensor of the folder.

    Args:
        dtype: "auto" keeps every tensor as stored, and what is quantised in the dtype that config.json names; else
            linear maps and embeddings are cast, while A_log, dt_bias and the norms keep the precision they are stored
            in, which their arithmetic uses.
        device: "auto" is CUDA where there is one, else the CPU.
        progress: show a bar on the terminal.
        experts: where routed experts are. "memory"; "int8", in a byte a weight with a scale an output row; "disk", in
            the files, from which the experts that tokens route to are read into a cache, so that a model runs that is
            several times larger than memory. docs/larger_than_memory.md has figures.
        expert_cache: bytes for experts read from the files, as "2GiB"; `model.expert_cache.report` tells the hit rate.
        weights: how linear maps and experts in memory are kept. "dequantised", in `dtype`; "stored", in the groups of 4
            or 8 bits that the folder stores them in, where it does (compressed-tensors, GPTQ and AWQ in order, GGUF
            Q8_0 and Q4_0), with values equal to the dequantised ones; "int8" and "int4" as "stored", and all else is
            rounded (`model.rounding` has the errors). Router, gates, norms, convolution and embedding stay as stored.
            docs/quantised.md has figures.
        adapters: folders of LoRA adapters that PEFT wrote; all act, with weight 1. `model.adapters` switches them.
    Raises: ValueError that names file and tensor for anything missing, left over, misshapen, truncated or unsafe;
        nothing is left half-loaded.
    """
    model = load_as(
        Qwen3Next,
        path,
        dtype=dtype,
        device=device,
        progress=progress,
        experts=experts,
        expert_cache=expert_cache,
        weights=weights,
    )
    if adapters:
        model.adapters.use({model.adapters.load(folder): 1.0 for folder in adapters})
    return model
