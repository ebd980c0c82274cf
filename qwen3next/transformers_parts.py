"""The model and its blocks, with the switches of transformers' models: checkpointing, RoPE types, experts functions."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layers.mlp import activate
from layers.moe import Experts, RouterStats, SparseMoE
from layers.rope import Rotation, inverse_frequencies
from qwen3next.api import Qwen3Next
from qwen3next.block import Block
from qwen3next.checkpoints.transformers_names import ROPE_TYPES, model_config
from qwen3next.decoding.description import KINDS, describes
from qwen3next.generation.block_parts import WHOLE


class Core(Qwen3Next):
    """`q.Qwen3Next` by transformers' configuration; RoPE of a type that is neither plain nor YaRN is transformers'."""

    rope: "Qwen3NextRotaryEmbedding | None"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(model_config(config))
        own = config.rope_parameters["rope_type"] in ROPE_TYPES
        self.__dict__["rope"] = None if own else Qwen3NextRotaryEmbedding(config)  # not a part that compiled steps know

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        if self.rope is None:
            return super()._rotation(positions, dtype)
        return self.rope.rotation(positions, dtype)


class Qwen3NextRotaryEmbedding(nn.Module):
    """RoPE of every type that transformers knows, where its models have it: `model.model.rotary_emb`.

    It keeps no tensors; the model asks it only for types that are neither plain nor YaRN.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config, self._length = config, 1  # of the last call, which some types stretch by

    def frequencies(self, device: torch.device | None = None) -> tuple[Tensor, float]:
        """Radians a position, fp64 (rotary dim / 2), and what cos and sin are multiplied by."""
        if (kind := self.config.rope_parameters["rope_type"]) not in ROPE_TYPES:
            found, scale = ROPE_INIT_FUNCTIONS[kind](self.config, device, seq_len=self._length)
            return found.double(), scale
        c = model_config(self.config)
        yarn = c.rope_scaling
        return inverse_frequencies(
            c.rotary_dim, c.rope_theta, device, yarn=yarn
        ), 1.0 if yarn is None else yarn.magnitude

    @property
    def inv_freq(self) -> Tensor:
        """The frequencies of the last call."""
        return self.frequencies()[0]

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at these positions (b, t)."""
        self._length = int(positions.max()) + 1
        frequencies, scale = self.frequencies(positions.device)
        angles = positions[..., None, None].double() * frequencies.repeat(2)
        return Rotation((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (b, t, rotary dim) in the dtype of x, as transformers' modules return them."""
        cos, sin = self.rotation(position_ids, x.dtype)
        return cos.squeeze(2), sin.squeeze(2)


class PartOfOthers:
    """A text model that AutoModel.from_config also makes inside of other models, such as those with a vision tower.

    These need transformers' own class, of the same name, whose positions and parameter names they use.
    """

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **options: Any) -> Any:
        return getattr(transformers, cls.__name__)._from_config(config, **options)


class Qwen3NextDecoderLayer(GradientCheckpointingLayer, Block):
    """A block that transformers' gradient checkpointing can run again in the backward pass."""

    def forward(self, *args: Any, **options: Any) -> Any:
        x, stats = Block.forward(self, *args, **options)
        return (x, *(stats or ()))  # flat: a reentrant checkpoint sees no tensors inside of tuples

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, RouterStats | None]:
        x, *stats = super().__call__(*args, **options)
        return x, RouterStats(*stats) if stats else None


class Qwen3NextExperts(Experts):
    """Experts that also run by the functions of transformers' `set_experts_implementation`; "eager" is ours."""

    config: PreTrainedConfig
    has_gate = is_concatenated = True
    has_bias = has_post_expert_norm = is_transposed = _is_expert_parallel = False

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if self.config._experts_implementation == "eager":
            return super().forward(x, weights, indices)
        run = ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, None)
        return run(self, x, indices, weights.to(x.dtype))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return activate(*gate_up.chunk(2, dim=-1), backend=self.elementwise_backend)

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]


def fit(core: Qwen3Next, config: PreTrainedConfig) -> None:
    """Give the modules of `core` the classes that transformers' switches act on."""
    for block in core.blocks:
        block.__class__ = Qwen3NextDecoderLayer
        if isinstance(block.mlp, SparseMoE) and type(block.mlp.experts) is Experts:
            block.mlp.experts.__class__ = Qwen3NextExperts
            block.mlp.experts.config = config


for ours, reference in ((Qwen3NextDecoderLayer, Block), (Qwen3NextExperts, Experts)):
    describes(ours, roles=KINDS[reference].roles)(KINDS[reference].describe)
WHOLE.add(Qwen3NextDecoderLayer.forward)
