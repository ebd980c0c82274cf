"""The model: embeddings, blocks, final norm, head, and the multi-token prediction head."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.cross_entropy import linear_cross_entropy
from layers.dispatch.attached import attached
from layers.dispatch.backends import choose_for
from layers.experts.cache import ExpertCache
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.hook_point import HookPoint
from layers.linear import Linear
from layers.mlp import SwiGLU
from layers.moe import Experts, RouterStats
from layers.norm import GatedRMSNorm, RMSNorm, at_least_fp32
from layers.rope import Rotation, Yarn, rotation
from layers.segments import UNKNOWN, Segments
from layers.variants.attention import AttentionVariant
from qwen3next.block import Block
from qwen3next.cache.hybrid import HybridCache, new_cache
from qwen3next.checkpoints.fingerprint import WeightSums
from qwen3next.checkpoints.state_dict_adapter import Layout
from qwen3next.config import ModelConfig
from qwen3next.decoding.cuda_graph import graph_for
from qwen3next.decoding.plan import Slot, plan_for
from qwen3next.decoding.protocol import like
from qwen3next.generation.generation_config import GenerationConfig
from qwen3next.generation.prefill import check_ids, prefill, score
from qwen3next.hooks.hooked import Hooked
from qwen3next.mtp import MTP


@dataclass
class Output:
    """What a forward gives.

    Attributes:
        logits: (b, t or logits_to_keep, vocab).
        hidden: (b, t, width) after the final norm: what the heads read.
        aux: router statistics stacked over the sparse layers; None with a cache or in a dense model.
    """

    logits: Tensor
    hidden: Tensor
    aux: RouterStats | None


@dataclass
class Losses:
    """Means over `targets` predicted tokens, in nats; `total` weighs them by the config's coefficients.

    `mtp` is over the tokens two ahead; `balance` and `z` are means over the sparse layers, the MTP layer included.
    `load` is each sparse layer's share of choices by expert (layers, e). Losses that a model lacks are zero.
    """

    total: Tensor
    lm: Tensor
    mtp: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor | None
    targets: int


class Qwen3Next(Hooked, nn.Module):
    """The hybrid language model. Random weights until loaded; `qwen3next.load` opens checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, mixer=kind, sparse=config.is_sparse(i)) for i, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, zero_centred=config.zero_centred_norms)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.mtp_num_hidden_layers else None
        self.hook_embed = HookPoint("b t width")
        self.hook_final_normalized = HookPoint("b t width", dtype="fp32")  # before the final norm's scale
        self.hook_final_norm = HookPoint("b t width")
        self.hook_logits = HookPoint("b t vocab")
        self.name_hooks()
        # Set by `load`: the arrangement and folder of the checkpoint, and what its generation_config.json says.
        self.layout: Layout | None = None
        self.origin: Path | None = None
        self.generation_config = GenerationConfig()
        self._warned_of_length = False
        self.decode_backend = self.cross_entropy_backend = "auto"
        self.decode_slot = Slot()
        self.expert_cache: ExpertCache | None = None  # where routed experts stay in the files,
        self.experts_in = ""  # as they were when it was loaded
        self.weight_sums = WeightSums()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear maps, experts, router and embeddings N(0, initializer_range); norms and decay as their modules say."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std)
            elif isinstance(module, (RMSNorm, GatedRMSNorm, GatedDeltaNet, AttentionVariant)):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        segments: Segments | None = None,
        cache: HybridCache | None = None,
        logits_to_keep: int = 0,
    ) -> Output:
        """Predict the next token after each one.

        Args:
            segments: where sequences begin and end (packed or padded rows); None means every row is one sequence. Where
                tokens are absent within a row, those behind them are moved up, as hooks see it.
            cache: what came before; extended by these tokens, without gradients.
            logits_to_keep: compute logits for the last so many columns only; 0 means all.
        Raises: ValueError for ids outside the vocabulary, an empty batch, or tokens that do not fit the cache.
        """
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must not be negative, got {logits_to_keep}: 0 keeps all of them.")
        hidden, aux, _ = self._backbone(as_ids(input_ids), segments, cache, stats=cache is None)
        logits = self.hook_logits(self.lm_head(hidden[:, -logits_to_keep:]))
        return Output(logits, hidden, _stack(aux))

    def residual(
        self,
        stop_at_layer: int,
        input_ids: Int[Tensor, "b t"],
        segments: Segments | None = None,
        cache: HybridCache | None = None,
    ) -> Float[Tensor, "b t width"]:
        """The residual stream before block `stop_at_layer`, which may count from the end; later blocks do not run.

        Raises: as forward; ValueError for a block that is not there, or a cache, whose later layers would miss tokens.
        """
        count = len(self.blocks)
        if not -count <= stop_at_layer <= count:
            raise ValueError(f"Cannot stop before block {stop_at_layer} of {count}: choose {-count} to {count}.")
        if cache is not None:
            raise ValueError("Stopping at a layer would leave the cache half-filled: run without a cache.")
        stop = stop_at_layer + count if stop_at_layer < 0 else stop_at_layer
        check_ids(input_ids)
        input_ids = as_ids(input_ids)
        given = Segments.full(input_ids) if segments is None else segments
        input_ids, segments = given.closed(input_ids)
        segments = self._check(input_ids, segments, None)
        return given.reopened(self._stream(input_ids, segments, None, stats=False, stop=stop)[0])

    def _backbone(
        self, input_ids: Tensor, segments: Segments | None, cache: HybridCache | None, *, stats: bool
    ) -> tuple[Tensor, list[RouterStats], Segments]:
        """Hidden states after the final norm, router statistics a sparse layer, and where the sequences are."""
        if segments is not None and segments.gapped:
            ids, together = segments.closed(input_ids)
            hidden, aux, _ = self._backbone(ids, together, cache, stats=stats)
            return segments.reopened(hidden), aux, segments
        segments = self._check(input_ids, segments, cache)
        with nullcontext() if cache is None else cache.call(segments):
            x, aux = self._stream(input_ids, segments, cache, stats=stats, stop=len(self.blocks))
            hidden = self.hook_final_norm(self.norm(x, hook_normalized=self.hook_final_normalized))
            if cache is not None:
                self._advance(cache, input_ids, segments, hidden)
        return hidden, aux, segments

    def _advance(self, cache: HybridCache, input_ids: Tensor, segments: Segments, hidden: Tensor) -> None:
        """Note what a call has run; the MTP layer remembers the pairs that it completes."""
        if cache.mtp is not None and self.mtp is not None:
            waiting = hidden.new_zeros(cache.batch, hidden.shape[-1]) if cache.hidden is None else cache.hidden
            rope = self._rotation(segments.positions - 1, hidden.dtype)
            self.mtp.remember(hidden, waiting, self.embed_tokens(input_ids), rope, segments, cache.mtp)
        cache.advance(input_ids, segments, hidden)

    def _check(self, input_ids: Tensor, segments: Segments | None, cache: HybridCache | None) -> Segments:
        """Where the sequences are, what a cache holds counted in. Raises: as forward."""
        check_ids(input_ids)
        if segments is not None and (segments.batch, segments.length) != tuple(input_ids.shape):
            raise ValueError(
                f"segments describe a batch of {segments.batch} x {segments.length} tokens, "
                f"input_ids are {input_ids.shape[0]} x {input_ids.shape[1]}."
            )
        if cache is not None:
            if cache.yarn != self.config.rope_scaling:
                raise ValueError(
                    "The cache was made with another RoPE scaling: its keys are turned otherwise. Make a new one."
                )
            cache.check(self.config)
            if cache.hidden is not None and cache.hidden.dtype != (dtype := like(self).dtype):
                cache.cast(dtype)
            if segments is not None and segments.sequences == UNKNOWN:
                raise ValueError("A cache cannot count sequences in a traced graph: make the segments outside of it.")
            segments = cache.admit(segments, input_ids)
            if cache.model is None:  # from a pickle
                cache.model = weakref.ref(self)
        elif segments is None:
            segments = Segments.full(input_ids)
        if torch.compiler.is_compiling():
            return segments
        if not self._warned_of_length and segments.plain and max(segments.ends) > self.config.longest_context:
            self._warned_of_length = True
            warnings.warn(
                f"Positions up to {max(segments.ends)} lie beyond the {self.config.longest_context} of this model: "
                "its answers may be noise. model.extend_context(factor) stretches them (YaRN).",
                stacklevel=4,
            )
        if input_ids.device.type == "cpu":
            # A few are quicker as numbers, which counts in decoding.
            few = input_ids.numel() <= 8
            ids: list[int] = input_ids.flatten().tolist() if few else [int(input_ids.min()), int(input_ids.max())]
            if not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise ValueError(
                    f"input_ids hold {min(ids)} to {max(ids)}; this model knows "
                    f"0 to {self.vocab_size - 1}: was the text encoded with another tokenizer?"
                )
        return segments

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        c = self.config
        return rotation(positions, rotary_dim=c.rotary_dim, theta=c.rope_theta, dtype=dtype, yarn=c.rope_scaling)

    def _stream(
        self, input_ids: Tensor, segments: Segments, cache: HybridCache | None, *, stats: bool, stop: int
    ) -> tuple[Tensor, list[RouterStats]]:
        """The residual stream before block `stop`, and router statistics a sparse layer."""
        same = len(set(segments.past)) == 1
        self.hook_call["position"] = segments.past[0] if same else segments.past
        x = segments.real(self.hook_embed(self.embed_tokens(input_ids)))
        rope = self._rotation(segments.positions, x.dtype)
        counted, aux = None if segments.plain else segments.mask, []
        for i, block in enumerate(self.blocks[:stop]):
            state = None if cache is None else cache.layers[i]
            x, router = block(x, rope, segments=segments, state=state, counted=counted, stats=stats)
            aux += [] if router is None else [router]
        return x, aux

    @torch.no_grad()
    def step(self, input_ids: Int[Tensor, "b t"], cache: HybridCache) -> Float[Tensor, "b vocab"]:
        """A step of generation: extend the cache by a few tokens; logits after the last of them.

        As forward, but where that can run (`q.explain`) on the CPU in compiled code, several times as fast, and a token
        a row on CUDA as one graph; their last bits are their own. Where somebody looks inside, the modules run.
        """
        input_ids = as_ids(input_ids)
        if type(self).forward is Qwen3Next.forward:
            segments = self._check(input_ids, None, cache)
            graph = graph_for(self, segments, cache)
            if graph is not None:
                with cache.call(segments):
                    hidden, logits = graph.run(cache, input_ids)
                    self._advance(cache, input_ids, segments, hidden)
                return logits
            plan = plan_for(self, segments, cache)
            if plan is not None:
                with cache.call(segments):
                    hidden, logits = plan.run(self, input_ids, segments, cache)
                    self._advance(cache, input_ids, segments, hidden)
                return logits
        return self(input_ids, cache=cache, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def logits_after(self, cache: HybridCache) -> Float[Tensor, "b vocab"]:
        """What comes after each row's last token, from the hidden state that the cache keeps of it.

        Raises: ValueError for a cache that knows no such state, because it is empty.
        """
        if cache.hidden is None:
            raise ValueError("The cache is empty: there is no token that another could follow.")
        plan = plan_for(self, Segments.full(cache.hidden[:, None]), cache)
        if plan is not None:
            return plan.head(cache.hidden)
        return self.hook_logits(self.lm_head(cache.hidden[:, None]))[:, 0]

    def loss(
        self, input_ids: Int[Tensor, "b t"], *, segments: Segments | None = None, labels: Tensor | None = None
    ) -> Losses:
        """Training losses; nothing is predicted across a boundary of `segments`.

        Args:
            labels: (b, t) the tokens to predict, −100 where none is, aligned with input_ids (a token is predicted from
                the one before it); None means input_ids themselves.
        Raises: ValueError where no token has a target.
        """
        input_ids = as_ids(input_ids)
        labels = input_ids if labels is None else labels
        self._check_labels(input_ids, labels)
        labels = as_ids(labels)
        if segments is not None and segments.gapped:
            labels = segments.closed(labels)[0]
            input_ids, segments = segments.closed(input_ids)
        hidden, aux, segments = self._backbone(input_ids, segments, None, stats=True)
        lm, targets = self._cross_entropy(hidden, labels, segments, ahead=1)
        if not torch.compiler.is_compiling() and not targets:
            if bool(segments.next_is_same().any()):
                raise ValueError(
                    "The labels of all tokens that have one before them are -100: give at least one of them its id."
                )
            raise ValueError("No token here has a next one to predict: give sequences of at least two tokens.")
        total, mtp = lm, lm.new_zeros(())
        if self.mtp is not None and self.config.mtp_loss_coef:
            embedding = self.embed_tokens(input_ids.roll(-1, dims=1))
            rope = self._rotation(segments.positions, hidden.dtype)
            ahead, mtp_aux = self.mtp(hidden, embedding, rope, segments)
            aux = aux + mtp_aux
            mtp, _ = self._cross_entropy(ahead, labels, segments, ahead=2, hook=self.mtp.hook_logits)
            total = total + self.config.mtp_loss_coef * mtp
        stats, zero = _stack(aux), lm.new_zeros(())
        balance, z = (zero, zero) if stats is None else (stats.balance.mean(), stats.z.mean())
        total = total + self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * z
        return Losses(total, lm, mtp, balance, z, None if stats is None else stats.load.detach(), targets)

    def _check_labels(self, input_ids: Tensor, labels: Tensor) -> None:
        check_ids(input_ids)
        check_ids(labels, "labels")
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels are {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}: align them.")
        if labels is not input_ids and not torch.compiler.is_compiling():
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.vocab_size))]
            if len(wrong):
                raise ValueError(
                    f"labels hold {int(wrong[0])}: give ids of 0 to {self.vocab_size - 1}, or -100 where nothing is "
                    "to be predicted."
                )

    def _cross_entropy(
        self, hidden: Tensor, labels: Tensor, segments: Segments, *, ahead: int, hook: HookPoint | None = None
    ) -> tuple[Tensor, int]:
        """Mean over the places whose token `ahead` is of the same sequence and labelled; and their number."""
        target = labels.roll(-ahead, dims=1)
        place = segments.next_is_same(ahead) & (target != -100)
        target, head = target[place], self.lm_head
        # Logits only where there is a target, unless somebody looks at them, or has changed how they are made.
        if _plain(head) and not (self.hook_logits if hook is None else hook).active:
            chosen = {"backend": self.cross_entropy_backend, "linear_backend": head.backend}
            summed = linear_cross_entropy(hidden[place], head.weight, target, **chosen)
            return summed / _count(place, target), len(target)
        if hook is None:  # all of them, as in a forward; what stands at padding reaches no gradient
            real = hidden if segments.plain else hidden.masked_fill(~segments.mask[..., None], 0.0)
            logits = self.hook_logits(head(real))[place]
        else:
            logits = hook(head(hidden[place]))
        summed = F.cross_entropy(at_least_fp32(logits), target, reduction="sum")
        return summed / _count(place, target), len(target)

    def new_cache(
        self,
        batch: int = 1,
        max_len: int = 4096,
        kv_dtype: str | torch.dtype | None = None,
        state_dtype: str | torch.dtype | None = None,
        history: int = 0,
        mtp: bool = False,
    ) -> HybridCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens; memory for them is taken as they come.

        Args:
            kv_dtype: of keys and values, "int8" among them; None is the model's dtype.
            state_dtype: of the recurrent states between calls; None is fp32, less loses precision with every call.
            history: tokens that `rollback` can take back at any time; costs two or three recurrent states and notes.
            mtp: remember for the MTP layer too, so that `draft` can look a token further ahead.
        """
        weight = like(self)
        cache = new_cache(
            self.config,
            batch=batch,
            max_len=max_len,
            dtype=weight.dtype,
            kv_dtype=_kv_dtype(kv_dtype, weight.dtype),
            device=self.device,
            state_dtype=None if state_dtype is None else as_dtype(state_dtype),
            history=history,
            mtp=mtp,
        )
        cache.model = weakref.ref(self)
        return cache

    def prefill(
        self,
        input_ids: Int[Tensor, "b t"],
        cache: HybridCache,
        chunk_size: int = 4096,
        *,
        segments: Segments | None = None,
        max_memory: int | str | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Run prompts into the cache in chunks; yields (columns done, columns in all) after each.

        `cache.last_logits` are then those after each sequence's last token. Chunks end at multiples of their size,
        which is rounded down to one of 64; a rest of fewer than 16 tokens joins the chunk before it. So their number
        leaves no trace: a prompt without padding, behind nothing or a multiple of 64 tokens, gives the same bits.

        Args:
            segments: `Segments.from_mask(mask)` for padded prompts; packed ones are sequences of the cache in order.
            max_memory: for the cache and all that is taken and given back, weights left out, as "8GiB"; where chunks
                would take more, they are made smaller.
        Raises: ValueError as forward does, and for a max_memory in which the prompt cannot be run.
        """
        return prefill(self, input_ids, cache, chunk_size, segments=segments, max_memory=max_memory)

    def score(
        self, input_ids: Int[Tensor, "b t"], *, chunk_size: int = 1024, cache: HybridCache | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The loss of each token, −ln p, a chunk at a time: yields (tokens done, (b, n) losses), never all logits.

        The first token of all has no loss. `cache` may hold what came before: then the first one here is scored by it.
        Raises: ValueError where there is nothing to score.
        """
        return score(self, input_ids, chunk_size=chunk_size, cache=cache)

    @torch.no_grad()
    def draft(self, cache: HybridCache, token: Int[Tensor, "b"]) -> Float[Tensor, "b vocab"]:
        """What the MTP layer expects after `token`, which is to follow all that the cache holds and is not added to it.

        Raises: ValueError for a cache made without mtp=True, or an empty one.
        """
        if cache.mtp is None or self.mtp is None or cache.hidden is None or not min(cache.lengths):
            raise ValueError("A draft needs a cache that was made with mtp=True and holds at least one token a row.")
        check_ids(token, "token", ndim=1)
        token = as_ids(token)
        if len(token) != cache.batch:
            raise ValueError(f"token has {len(token)} ids and the cache {cache.batch} rows: give one a row.")
        if not 0 <= int(token.min()) <= int(token.max()) < self.vocab_size:
            raise ValueError(f"token holds {int(token.min())} to {int(token.max())} of 0 to {self.vocab_size - 1}.")
        segments = Segments.full(token[:, None]).after([n - 1 for n in cache.lengths])
        rope = self._rotation(segments.positions, cache.hidden.dtype)
        state = cache.mtp.share(max(segments.past))  # continued here and forgotten
        ahead, _ = self.mtp(cache.hidden[:, None], self.embed_tokens(token[:, None]), rope, segments, state)
        return self.mtp.hook_logits(self.lm_head(ahead[:, 0]))

    def extend_context(self, factor: float) -> None:
        """Stretch RoPE by YaRN for contexts `factor` times as long as in training; 1 takes it back.

        Caches made before are refused from now on. Short contexts lose a little: use the smallest factor that serves.
        """
        yarn = self.config.rope_scaling
        longest = self.config.max_position_embeddings if yarn is None else yarn.original_max_position_embeddings
        scaling = Yarn(factor=factor, original_max_position_embeddings=longest) if factor != 1 else None
        self.config, self._warned_of_length = self.config.replace(rope_scaling=scaling), False

    def set_backend(self, operation: str, name: str) -> None:
        """Choose how an operation of `q.explain` runs in every layer, or as a whole; "auto" picks again.

        Args:
            operation: "linear" (products with weights, the experts' too), "elementwise" (norms and activations,
                likewise), "delta_rule" (the convolution follows it), "attention", "experts" (what surrounds their
                products), "decode" or "cross_entropy".

        Raises: ValueError for an unknown operation or backend; RuntimeError where a named one cannot run here.
        """
        kinds: dict[str, Any] = {
            "linear": Linear,
            "elementwise": (RMSNorm, GatedRMSNorm, SwiGLU),
            "delta_rule": GatedDeltaNet,
            "attention": GatedAttention,
            "experts": Experts,
        }
        attribute = f"{operation}_backend"  # of modules that do several kinds of things
        if operation not in kinds and operation not in ("decode", "cross_entropy"):
            known = ", ".join((*kinds, "decode", "cross_entropy"))
            raise ValueError(f"There is no operation {operation!r} to choose for: {known}.")
        with torch.no_grad():
            choose_for(operation, name, self.device, like(self).dtype)
        self.decode_slot = Slot()  # look anew at the next step
        if operation not in kinds:
            setattr(self, attribute, name)
            return
        if not any(isinstance(module, kinds[operation]) for module in self.modules()):
            raise ValueError(f"This model has no {operation} of its own whose backend could be chosen: see q.explain.")
        for module in self.modules():
            if isinstance(module, kinds[operation]):
                setattr(module, "backend", name)  # noqa: B010
            elif hasattr(module, attribute):
                setattr(module, attribute, name)

    def recompute(self, *parts: str) -> None:
        """Make these again in the backward pass instead of keeping what they computed; in place of what was chosen.

        Gradients are the same to the bit. The router is not run again: experts are those that it chose, and statistics
        count once. Layers with hooks at their points keep everything.

        Args:
            parts: "linear_attention", "full_attention" (mixers of that kind), "mlp" (feed-forwards, experts); the MTP
                layer's too. None at all: nothing is made again.
        Raises: ValueError for a part that the model does not have.
        """
        found: dict[str, list[nn.Module]] = {"linear_attention": [], "full_attention": [], "mlp": []}
        for block in self.modules():
            if isinstance(block, Block):
                linear = block.mixer == "linear_attention"
                found[block.mixer].append(block.linear_attn if linear else block.self_attn)
                found["mlp"].append(block.mlp)
        known = [part for part, modules in found.items() if modules]
        for part in parts:
            if part not in known:
                raise ValueError(f"This model has no {part!r} to compute again: choose of {', '.join(known)}.")
        for part, modules in found.items():
            for module in modules:
                setattr(module, "recomputed", part in parts)  # noqa: B010

    def _apply(self, fn: Any, recurse: bool = True) -> "Qwen3Next":
        """As torch's, for `.to()` and the like; the memory of the weights before is let go first."""
        self.decode_slot = Slot()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's; likewise."""
        self.decode_slot = Slot()
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and safetensors in the released layout, MTP included."""
        from qwen3next.checkpoints.load_save import save

        save(self, folder)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config.json's eos_token_id, else config.json's."""
        given = self.generation_config.stop_tokens
        return self.config.stop_tokens if given is None else given

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights are; if they are put there for each call alone, the CPU."""
        offloaded = getattr(getattr(self.embed_tokens, "_hf_hook", None), "execution_device", None)  # accelerate's
        if offloaded is not None:
            return torch.device(offloaded)
        here = (p.device for p in self.parameters() if p.device.type != "meta")
        return next(here, torch.device("cpu" if attached(self, self.embed_tokens) else "meta"))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size


def _kv_dtype(name: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if name in ("int8", torch.int8):
        return torch.int8
    try:
        return default if name is None else as_dtype(name)
    except ValueError:
        known = "float32, bfloat16, float16, float64 or int8"
        raise ValueError(f"Keys and values cannot be kept in {name!r}: choose {known}.") from None


def _count(place: Tensor, target: Tensor) -> Tensor | int:
    """Targets, 1 at the least; as a tensor in a traced graph, which does not know how many there will be."""
    return place.sum().clamp(min=1) if torch.compiler.is_compiling() else max(len(target), 1)


def _plain(head: nn.Module) -> TypeGuard[Linear]:
    """Whether its product with the weight is all that a call of it would do."""
    return (
        type(head) is Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and not attached(head)
    )


def _stack(aux: list[RouterStats]) -> RouterStats | None:
    return RouterStats(*(torch.stack(x) for x in zip(*aux, strict=True))) if aux else None


def as_ids(ids: Tensor) -> Tensor:
    """Token ids in int64, from whole numbers of any width. Raises: ValueError for other numbers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers of shape (b, t), got {str(ids.dtype).removeprefix('torch.')}.")
    return ids.to(torch.int64)


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """torch's dtype of that name. Raises: ValueError for one in which nothing is computed, as FP8."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name!r} is no dtype to compute in: choose float32, bfloat16, float16 or float64.")
    return dtype


def as_device(name: str | torch.device) -> torch.device:
    """torch's device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises: ValueError for a name that is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no device: choose auto, cpu, cuda or cuda:0.") from None
