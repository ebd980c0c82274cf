"""The model in transformers' classes: after `import qwen3next.hf`, AutoModelForCausalLM and its like give this model.

`generate`, `pipeline`, `Trainer` and what is built on them (PEFT, TRL, lm-eval, accelerate) work on these classes.
Their modules are those of `model.core`, a `q.Qwen3Next`. docs/hf.md tells what differs from transformers' classes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import resolve_hidden_states_indices, selected_hidden_states

from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.moe import Experts, SparseMoE
from layers.norm import GatedRMSNorm, RMSNorm
from layers.variants.attention import AttentionVariant
from qwen3next.api import Qwen3Next, load
from qwen3next.cache.transformers_cache import HybridLayers, adopted, segments_of
from qwen3next.checkpoints.transformers_names import OURS, conversions
from qwen3next.decoding.plan import PlanCache
from qwen3next.files.json_files import read_object
from qwen3next.files.tensor_files import read_header
from qwen3next.hooks.layer_outputs import Columns, carried_on, pooled_balance, recorded, watched
from qwen3next.inputs import as_tokens
from qwen3next.mtp import MTP
from qwen3next.transformers_generate import Generates, stepped
from qwen3next.transformers_parts import Core, PartOfOthers, Qwen3NextDecoderLayer, Qwen3NextRotaryEmbedding, fit

# What tensor parallelism splits by rows, of the maps that are stored as they are here; each call gathers its output.
SPLIT = (
    *(f"self_attn.{name}_proj" for name in "kvo"),
    "linear_attn.out_proj",
    *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
)
BACKENDS = {"eager": "eager", "sdpa": "auto", "flash_attention_2": "flash"}  # of "attention", by transformers' names


class _Common(PreTrainedModel):
    """What backbone and language model have in common."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _is_stateful = False  # the cache can take tokens back
    _no_split_modules = ("Qwen3NextDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keys_to_ignore_on_load_unexpected = (r"^mtp\.", r"^model\.visual\.")
    _can_record_outputs = {  # noqa: RUF012  # what can be asked for; `_watched` records it
        "router_logits": SparseMoE,
        "hidden_states": Qwen3NextDecoderLayer,
        "attentions": GatedAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RMSNorm | GatedRMSNorm):
            init.constant_(module.weight, 0.0 if getattr(module, "zero_centred", False) else 1.0)
        elif isinstance(module, Experts):
            for matrix in (module.gate_up_proj, module.down_proj):
                init.normal_(matrix, std=self.config.initializer_range)
        elif isinstance(module, GatedDeltaNet):
            init.kaiming_uniform_(module.conv_weight, a=5**0.5)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())
            init.ones_(module.dt_bias)
        elif isinstance(module, AttentionVariant):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As classes of transformers with `@use_experts_implementation`: Qwen3NextExperts calls its functions."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @staticmethod
    def _load_pretrained_model(
        model: "_Common", state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """transformers', with the names and tensors of released checkpoints, and an MTP layer if the files have one."""
        files = [Path(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        names = state_dict or {name for file in files for name in read_header(file)}
        model._set_mtp(any(name.startswith("mtp.") for name in names), load_config.device_map)
        mapping, registered = load_config.weight_mapping or [], type(model).__name__ in USER_REGISTERED_MAPPINGS
        if any(name.endswith(OURS) for name in names):  # saved with save_original_format=False
            mapping = [] if registered else mapping
        elif not registered:
            mapping = [*mapping, *conversions(model.config, names)]
        load_config = replace(load_config, weight_mapping=mapping)
        report = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        model._freeze_mtp()
        return report

    def _freeze_mtp(self) -> None:
        """No loss of transformers reaches the MTP layer, and DDP would wait for its gradients."""
        if (mtp := getattr(self, "mtp", None)) is not None:
            mtp.requires_grad_(False)

    def _set_mtp(self, _present: bool, _device_map: dict | None) -> None:
        """Have an MTP layer or not; a backbone has none."""


class Backbone(_Common):
    """The model without its head, in transformers' signature.

    Attributes:
        core: the `q.Qwen3Next` that computes; without a head if this is not part of a language model.
    """

    def __init__(self, config: PreTrainedConfig, core: Qwen3Next | None = None):
        super().__init__(config)
        if core is None:
            core = Core(config)
            core.lm_head = nn.Identity()  # type: ignore[assignment]
        fit(core, config)
        self.__dict__["_core"] = core  # not a submodule: its modules are here under transformers' names
        self.embed_tokens, self.layers, self.norm = core.embed_tokens, core.blocks, core.norm
        self.rotary_emb = Qwen3NextRotaryEmbedding(config)
        self.embed_tokens.padding_idx = config.pad_token_id  # whose row gets no gradient, as in transformers
        self.gradient_checkpointing, self._attention_backend, self._plain = False, "auto", True
        self._weight_conversions = conversions(config)
        self.post_init()
        self._tp_plan = {f"layers.*.{name}": "colwise_gather_output" for name in SPLIT}

    @property
    def core(self) -> Qwen3Next:
        """As these modules are now: any may have been replaced."""
        core = self.__dict__["_core"]
        core._modules.update(embed_tokens=self.embed_tokens, blocks=self.layers, norm=self.norm)
        if core.config.vocab_size != self.config.vocab_size:
            core.config = core.config.replace(vocab_size=self.config.vocab_size)
        if self._attention_backend != (chosen := BACKENDS.get(self.config._attn_implementation, "auto")):
            core.set_backend("attention", chosen)
            self._attention_backend = chosen
        # Compiled steps know neither transformers' functions for experts nor its types of RoPE.
        plain = self.config._experts_implementation == "eager" and getattr(core, "rope", None) is None
        if self._plain != plain:
            core.set_backend("decode", "auto" if plain else "torch")
            self._plain = plain
        return core

    def _apply(self, *args: Any, **options: Any) -> Any:
        self.__dict__["_core"].plan_cache = PlanCache()  # which holds the weights as they were
        return super()._apply(*args, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> MoeModelOutputWithPast:
        """As transformers' Qwen3NextModel. `kwargs`: output_hidden_states, output_attentions, output_router_logits.

        Raises: ValueError for a mask that is not one number a token, or positions that do not count up by one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        core, wanted = self.core, self.wanted(kwargs)
        new = input_ids if inputs_embeds is None else inputs_embeds
        assert new is not None
        kept = self.cache(past_key_values, use_cache)
        segments = segments_of(new, attention_mask, position_ids, kept)
        if segments.packed:  # a cache holds one sequence a row
            kept = None
        columns, hybrid = Columns(segments), None if kept is None else kept.opened(core, *new.shape[:2])
        stats = "router_logits" in wanted and core.config.num_experts > 0
        tokens = as_tokens(input_ids, inputs_embeds)
        run, embeds = columns.taken(tokens), None if inputs_embeds is None else columns.taken(inputs_embeds)
        with watched(core, wanted) as seen:
            hidden, aux, _ = core.hidden_states(run, columns.run, hybrid, stats=stats, embeds=embeds)
        self.__dict__["_stats"] = aux
        if kept is not None:
            kept.took(core, tokens, segments, inputs_embeds)
        hidden = columns.spread(hidden) if self.training else carried_on(columns.spread(hidden), segments)
        found = recorded(seen, columns, None if hybrid is None or kept is None else kept.columns)
        if "hidden_states" in wanted:
            states: list[Any] = [*found["hidden_states"], hidden]
            if (chosen := selected_hidden_states(wanted["hidden_states"])) is not None:
                indices = resolve_hidden_states_indices(self, chosen, len(states))
                states = [x if i in indices else None for i, x in enumerate(states)]
            found["hidden_states"] = tuple(states)
        return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept, **found)

    def wanted(self, options: dict[str, Any]) -> dict[str, Any]:
        """What is to be recorded, as asked for in a call or else in the configuration."""
        asked = {key: options.get(f"output_{key}") for key in self._can_record_outputs}
        asked = {key: getattr(self.config, f"output_{key}", None) if x is None else x for key, x in asked.items()}
        return {key: x for key, x in asked.items() if x is not None and x is not False}

    def cache(self, given: Cache | None, use_cache: bool | None) -> HybridLayers | None:
        """The cache of a call, if it has one: given, or new."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if (self.gradient_checkpointing and self.training) or (given is None and not use_cache):
            return None  # tokens that are run again would enter it twice
        return adopted(DynamicCache(config=self.config) if given is None else given)


class CausalLM(_Common, Generates):
    """The language model, in transformers' signature.

    Attributes:
        core: the `q.Qwen3Next` of the same modules, with all that it can: hooks, prefill, `q.explain`.
        mtp: the MTP layer, if the checkpoint has one. Saved with the rest; transformers' loss does not train it.
    """

    backbone: type[Backbone]
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig, core: Qwen3Next | None = None):
        super().__init__(config)
        core = Core(config) if core is None else core
        self.model, self.lm_head, self.mtp = self.backbone(config, core), core.lm_head, core.mtp
        self._weight_conversions = conversions(config)
        self._freeze_mtp()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """transformers'; weights in FP8 are read by `q.load`, in the dtype that config.json names."""
        folder = Path(str(pretrained_model_name_or_path))
        file = folder / "config.json"
        if not file.is_file() or not (read_object(file, "a configuration").get("quantization_config") or {}):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        core = load(folder, dtype=options.get("dtype") or "auto", device="cpu")
        config = cls.config_class.from_pretrained(folder)
        del config.quantization_config
        config.dtype, config.mtp_num_hidden_layers = core.dtype, core.config.mtp_num_hidden_layers
        for parameter in core.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        return cls(config, core).eval()

    @property
    def core(self) -> Qwen3Next:
        """As these modules are now: any may have been replaced."""
        core = self.model.core
        core._modules.update(lm_head=self.lm_head, **({} if self.mtp is None else {"mtp": self.mtp}))
        return core

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> MoeCausalLMOutputWithPast:
        """As transformers' Qwen3NextForCausalLM; few tokens behind a cache take compiled code where that can run."""
        core, wanted = self.core, self.model.wanted({"output_router_logits": output_router_logits, **kwargs})
        if labels is None and not wanted:
            logits = stepped(self.model, past_key_values, input_ids, attention_mask, logits_to_keep)
            if logits is not None:
                return MoeCausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        options = {**kwargs, "return_dict": True, "output_router_logits": output_router_logits}
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **options)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = core.hook_logits(self.lm_head(out.last_hidden_state[:, columns]))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if stats := self.model.__dict__.pop("_stats", None):
            aux_loss = pooled_balance(stats, self.config.num_experts_per_tok)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss, aux_loss, logits, out.past_key_values, out.hidden_states, out.attentions, out.router_logits
        )

    def _set_mtp(self, present: bool, device_map: dict | None) -> None:
        core = self.core
        if present == (core.mtp is not None):
            return
        self.config.mtp_num_hidden_layers = int(present)
        core.config = core.config.replace(mtp_num_hidden_layers=int(present))
        with torch.device("meta"):
            core.mtp = self.mtp = MTP(core.config).to(self.dtype) if present else None
        core.name_hooks()
        if present and device_map and "" not in device_map:
            device_map["mtp"] = device_map.get("lm_head", list(device_map.values())[-1])


# GenerationMixin stands in the bases, where tools look for it.
class Qwen3NextModel(Backbone):
    config_class = Qwen3NextConfig


class Qwen3NextForCausalLM(CausalLM, GenerationMixin):
    config_class, backbone = Qwen3NextConfig, Qwen3NextModel


class Qwen3_5TextModel(PartOfOthers, Backbone):  # transformers' names
    config_class = Qwen3_5TextConfig


class Qwen3_5ForCausalLM(CausalLM, GenerationMixin):
    config_class, backbone = Qwen3_5TextConfig, Qwen3_5TextModel


class Qwen3_5MoeTextModel(PartOfOthers, Backbone):
    config_class = Qwen3_5MoeTextConfig


class Qwen3_5MoeForCausalLM(CausalLM, GenerationMixin):
    config_class, backbone = Qwen3_5MoeTextConfig, Qwen3_5MoeTextModel


class Qwen3Model(PartOfOthers, Backbone):
    config_class = Qwen3Config


class Qwen3ForCausalLM(CausalLM, GenerationMixin):
    config_class, backbone = Qwen3Config, Qwen3Model


for _model in (Qwen3NextForCausalLM, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3ForCausalLM):
    AutoModel.register(_model.config_class, _model.backbone, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
