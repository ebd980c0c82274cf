"""Decompose the residual stream into the contributions of its components, and attribute logits to them.

Shapes: b batch, t tokens, c components, h heads. Sums are equal up to rounding (fp64: 1e-12), as the model adds in
another order. bf16 is summed in fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.norm import RMSNorm, at_least_fp32
from qwen3next.block import Block
from qwen3next.hooks.wrappers import unwrapped
from qwen3next.interp.points import CachedPoints, Index, as_index

Components = Float[Tensor, "c b t width"]
Labelled = Components | tuple[Components, list[str]]
RESIDUAL_FILTER = ["hook_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"]
LENS_PIECE = 256  # tokens whose logits are in memory at a time


class Lens(NamedTuple):
    """Next-token predictions from the residual stream at each depth.

    Attributes:
        labels: (c,) names of the depths.
        ids: (c b t k) the k most likely next tokens.
        log_probs: (c b t k) their log-probabilities, in nats.
    """

    labels: list[str]
    ids: Int[Tensor, "c b t k"]
    log_probs: Float[Tensor, "c b t k"]


class ResidualStream(CachedPoints):
    """Analyses of the points along the residual stream."""

    def decompose_resid(
        self,
        layer: int | None = None,
        *,
        mlp_input: bool = False,
        mode: str = "all",
        pos_slice: Index | None = None,
        return_labels: bool = False,
    ) -> Labelled:
        """The embedding and the output of every mixer and feed-forward; they sum to the residual stream at `layer`.

        Args:
            layer: the layer whose input is decomposed; None or the number of layers for the final residual stream.
            mlp_input: decompose the input of that layer's feed-forward, which includes its mixer's output.
            mode: "all", or "attn" or "mlp" for the embedding and one kind of component only.
            pos_slice: only these tokens.
            return_labels: also return the names of the components.
        Raises: ValueError for an unknown mode or layer.
        """
        if mode not in ("all", "attn", "mlp"):
            raise ValueError(f"mode {mode!r} is unknown: choose all, attn or mlp.")
        end = self._depth(layer)
        names, labels = ["hook_embed"], ["embed"]
        for i in range(min(end + mlp_input, self.layers)):
            kind = "attn" if self.model.config.layer_types[i] == "full_attention" else "gdn"
            if mode != "mlp":
                names, labels = [*names, f"blocks.{i}.hook_attn_out"], [*labels, f"{i}_{kind}_out"]
            if mode != "attn" and i < end:
                names, labels = [*names, f"blocks.{i}.hook_mlp_out"], [*labels, f"{i}_mlp_out"]
        stack = self._stack(self.need(names, RESIDUAL_FILTER), pos_slice)
        return (stack, labels) if return_labels else stack

    def accumulated_resid(
        self,
        layer: int | None = None,
        *,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Index | None = None,
        return_labels: bool = False,
    ) -> Labelled:
        """The residual stream before each layer up to and including `layer`; None: up to the final residual stream.

        Args:
            incl_mid: also between mixer and feed-forward.
            apply_ln: apply the final norm to each, as a logit lens does.
        """
        names, labels, end = [], [], self._depth(layer)
        for i in range(end + 1):
            last = i == self.layers
            names.append(f"blocks.{i - 1}.hook_resid_post" if last else f"blocks.{i}.hook_resid_pre")
            labels.append("final_post" if last else f"{i}_pre")
            if incl_mid and i < end:
                names, labels = [*names, f"blocks.{i}.hook_resid_mid"], [*labels, f"{i}_mid"]
        stack = self._stack(self.need(names, ["blocks.*.hook_resid_*"]), pos_slice)
        stack = stack * _scale(self.model.norm, stack) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def apply_ln_to_stack(
        self, stack: Components, layer: int | None = None, *, mlp_input: bool = False, pos_slice: Index | None = None
    ) -> Components:
        """Scale components as the norm before `layer` (None: the final norm) scaled their sum in this forward.

        The scale of that forward is frozen, so the norm is linear, and the results sum to its output.
        """
        i = self._depth(layer)
        norm: RMSNorm = self.model.norm
        name = f"blocks.{self.layers - 1}.hook_resid_post"
        if i < self.layers:
            block = self._block(i)
            norm = block.post_attention_layernorm if mlp_input else block.input_layernorm
            name = f"blocks.{i}.hook_resid_{'mid' if mlp_input else 'pre'}"
        x = self.need([name], [name])[0][:, as_index(pos_slice)]
        return stack * _scale(norm, x)

    def logit_attrs(
        self,
        components: Components,
        tokens: int | Int[Tensor, "..."],
        incorrect_tokens: int | Int[Tensor, "..."] | None = None,
        *,
        pos_slice: Index | None = None,
    ) -> Float[Tensor, "c b t"]:
        """The contribution of each component to the logit of `tokens`, or to its difference from `incorrect_tokens`.

        The final norm's scale is frozen and the head has no bias, so the contributions of all components of
        `decompose_resid()` sum to the logit.

        Args:
            components: components for the tokens that `pos_slice` selects.
            tokens: one id for all, or ids that broadcast to (b t): (b 1) for one per row.
        """

        def rows(ids: int | Tensor) -> Tensor:
            return at_least_fp32(_matrix(self.model.lm_head)[ids].to(components.device))

        direction = rows(tokens) if incorrect_tokens is None else rows(tokens) - rows(incorrect_tokens)
        return (self.apply_ln_to_stack(components, pos_slice=pos_slice) * direction).sum(-1)

    def stack_head_results(
        self, layer: int = -1, *, pos_slice: Index | None = None, return_labels: bool = False
    ) -> Labelled:
        """The contribution of every head to the residual stream, after the gate, also of Gated DeltaNet heads.

        Args:
            layer: one layer, whose heads sum to its hook_attn_out (without o_proj's bias, if any); -1 for all layers.
        Raises: ValueError for a layer that norms or gates the sum of its heads.
        """
        chosen = range(self.layers) if layer == -1 else [layer]
        results, labels = [], []
        for i in chosen:
            mixer = self._mixer(i)
            if self._block(i).sandwich or getattr(mixer, "position", "") == "G5":
                raise ValueError(
                    f"Block {i} norms or gates the sum of its heads, so a single head's contribution is not defined: "
                    "choose another layer."
                )
            name = self.full_name(("gated", i))
            gated = at_least_fp32(self.need([name], ["blocks.*.hook_gated"])[0][:, as_index(pos_slice)])
            project = mixer.out_proj if isinstance(mixer, GatedDeltaNet) else mixer.o_proj
            weight = at_least_fp32(_matrix(project)).to(gated.device)
            results.append(torch.einsum("bthd,whd->hbtw", gated, weight.unflatten(1, gated.shape[2:])))
            labels += [f"L{i}H{h}" for h in range(gated.shape[2])]
        stack = torch.cat(results)
        return (stack, labels) if return_labels else stack

    @torch.no_grad()
    def logit_lens(self, *, top: int = 1, incl_mid: bool = False, pos_slice: Index | None = None) -> Lens:
        """The `top` most likely next tokens at each depth. Only the logits of a few tokens are in memory at a time."""
        stack, labels = self.accumulated_resid(incl_mid=incl_mid, pos_slice=pos_slice, return_labels=True)
        flat, ids, log_probs = stack.flatten(0, 2), [], []
        for x in flat.split(LENS_PIECE):
            logits = self.model.lm_head(self.model.norm(x.to(self.model.device, self.model.embed_tokens.weight.dtype)))
            best = at_least_fp32(logits).log_softmax(-1).topk(top)
            ids.append(best.indices)
            log_probs.append(best.values)
        shape = (*stack.shape[:3], top)
        return Lens(labels, torch.cat(ids).view(shape), torch.cat(log_probs).view(shape))

    def _depth(self, layer: int | None) -> int:
        if layer is None or layer in (-1, self.layers):
            return self.layers
        if not 0 <= layer < self.layers:
            raise ValueError(f"There is no layer {layer}: choose 0 to {self.layers - 1}, or None for the end.")
        return layer

    def _block(self, layer: int) -> Block:
        if not -self.layers <= layer < self.layers:
            raise ValueError(f"There is no layer {layer}: choose 0 to {self.layers - 1}.")
        block = unwrapped(self.model.blocks[layer])
        assert isinstance(block, Block)
        return block

    def _mixer(self, layer: int) -> GatedDeltaNet | GatedAttention:
        block = self._block(layer)
        mixer = unwrapped(block.linear_attn if block.mixer == "linear_attention" else block.self_attn)
        assert isinstance(mixer, (GatedDeltaNet, GatedAttention))
        return mixer

    def _stack(self, tensors: Sequence[Tensor], pos_slice: Index | None) -> Components:
        index = as_index(pos_slice)
        return torch.stack([at_least_fp32(x[:, index]) for x in tensors])


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a plain linear layer. Raises: ValueError for one with an adapter, or without values."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None or weight.device.type == "meta":
        raise ValueError(
            f"A {type(module).__name__} has no weight to compute contributions from: merge its adapters into a plain "
            "linear layer, and keep it in memory."
        )
    return weight.detach()


def _scale(norm: RMSNorm, x: Tensor) -> Tensor:
    """The factor by which the norm multiplies x, in at least fp32. The norm's weight gets no gradient."""
    x, weight = at_least_fp32(x), at_least_fp32(norm.weight.detach()).to(x.device)
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (weight + (1.0 if norm.zero_centred else 0.0))
