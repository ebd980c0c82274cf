"""Steps of generation: a few tokens behind a cache, by the fastest way that gives the modules' result."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layers.deprecation import renamed_attribute
from layers.dispatch.attached import attached
from layers.segments import Segments
from qwen3next.cache.hybrid import Extension, HybridCache, new_cache
from qwen3next.config import ModelConfig
from qwen3next.decoding.cuda_graph import graph_for
from qwen3next.decoding.mtp_plan import MTPPlan, available_mtp_plan, note_pairs
from qwen3next.decoding.plan import MOST_TOKENS, PlanCache, available_plan, plan_for
from qwen3next.decoding.states import CacheStep
from qwen3next.decoding.step_many import looked_at, step_many, together
from qwen3next.inputs import as_dtype, as_ids, as_kv_dtype, check_vocabulary
from qwen3next.model import Qwen3Next as Reference


class Stepping(Reference):
    """The model with `new_cache`, `step`, `step_many`, `logits_after` and `draft`."""

    decode_slot = renamed_attribute("decode_slot", "plan_cache")

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.decode_backend = "auto"
        self.plan_cache = PlanCache()

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
        cache = new_cache(
            self.config,
            batch=batch,
            max_len=max_len,
            dtype=self.dtype,
            kv_dtype=as_kv_dtype(kv_dtype, self.dtype),
            device=self.device,
            state_dtype=None if state_dtype is None else as_dtype(state_dtype),
            history=history,
            mtp=mtp,
        )
        cache.model = weakref.ref(self)
        return cache

    @torch.no_grad()
    def step(self, input_ids: Int[Tensor, "b t"], cache: HybridCache) -> Float[Tensor, "b vocab"]:
        """Extend the cache by a few tokens, the same number in every row; logits after the last of them.

        As forward, but in compiled code on the CPU and as one CUDA graph on a GPU where these can run (`q.explain`);
        their last bits are their own. With hooks or tracers attached, the modules run.
        """
        if looked_at(self):
            return self(input_ids, cache=cache, logits_to_keep=1).logits[:, -1]
        input_ids, plan = as_ids(input_ids), None
        check_vocabulary(input_ids, self.vocab_size)
        with cache.extend(input_ids, None, self) as call:
            self._warn_of_length(call.segments)
            if graph := graph_for(self, call.segments, cache):
                hidden, logits = graph.run(cache, input_ids)
            elif plan := plan_for(self, call.segments, cache):
                (hidden,), logits = plan.run(self, [CacheStep(cache, call.segments, input_ids)])
            else:
                hidden, _ = self._run(input_ids, call.segments, call.layers, stats=False)
                logits = self.hook_logits(self.lm_head(hidden[:, -1:]))[:, -1]
            self._complete(call, input_ids, hidden, compiled=plan is not None)
        return logits

    @torch.no_grad()
    def step_many(
        self, tokens: Sequence[Tensor], caches: Sequence[HybridCache], *, all_logits: bool = False
    ) -> Float[Tensor, "n vocab"]:
        """Extend several caches at once, each of one sequence and by as many tokens as its row brings.

        On the CPU a row's results depend, to the bit, on its own sequence alone: not on the other rows, on their order,
        or on how its tokens are divided over calls of up to 64 (except that recurrent states kept in less than fp32
        are rounded by every call). Compiled code reads each weight once for all rows; where it cannot run, and for rows
        of more tokens, the modules run row by row, and hooks fire row by row.

        Args:
            tokens: the new ids of each row, (t,) of any length from 1.
            caches: the cache of each row; each may be given once.
            all_logits: give the logits after every token, row by row, not only after each row's last one.
        Returns: (rows, vocab), or with `all_logits` (tokens of all rows, vocab).
        Raises: ValueError, which names the row, before any cache changes. If a call fails, all caches are as before.
        """
        return step_many(self, tokens, caches, all_logits=all_logits)

    @torch.no_grad()
    def logits_after(self, cache: HybridCache) -> Float[Tensor, "b vocab"]:
        """Logits after each row's last token, from the hidden state that the cache keeps of it.

        Raises: ValueError for an empty cache.
        """
        if cache.hidden is None:
            raise ValueError("The cache is empty: there is no token that another could follow.")
        plan = plan_for(self, Segments.full(cache.hidden[:, None]), cache)
        if plan is not None:
            return plan.head(cache.hidden)
        return self.hook_logits(self.lm_head(cache.hidden[:, None]))[:, 0]

    @torch.no_grad()
    def step_all(self, input_ids: Int[Tensor, "b t"], cache: HybridCache) -> Float[Tensor, "b t vocab"]:
        """`step`, with the logits after every token: what single steps give, in compiled code in one call.

        On the CPU they are equal to the bit, where recurrent states are kept in fp32.
        """
        input_ids, plan = as_ids(input_ids), None if looked_at(self) else available_plan(self)
        if plan is None or input_ids.shape[1] > MOST_TOKENS or not plan.supports(cache):
            return torch.stack([self.step(token, cache) for token in input_ids.split(1, dim=1)], dim=1)
        check_vocabulary(input_ids, self.vocab_size)
        return together(self, plan, [(input_ids, cache)], all_logits=True).view(*input_ids.shape, -1)

    @torch.no_grad()
    def draft_tokens(self, cache: HybridCache, token: Int[Tensor, "b"], count: int) -> Int[Tensor, "b count"]:
        """The most likely `count` tokens behind `token`, by the MTP layer, which goes on from its own hidden states.

        Raises: as `draft`.
        """
        token = self._checked_draft(cache, token)
        if plan := self._draft_plan(cache):
            return plan.draft(self, cache, token, count)[0]
        return torch.stack([logits.argmax(-1) for logits in self._drafted(cache, token, count)], dim=1)

    @torch.no_grad()
    def draft(self, cache: HybridCache, token: Int[Tensor, "b"]) -> Float[Tensor, "b vocab"]:
        """What the MTP layer expects after `token`, which is to follow all that the cache holds and is not added to it.

        Raises: ValueError for a cache made without mtp=True, or an empty one.
        """
        token = self._checked_draft(cache, token)
        if plan := self._draft_plan(cache):
            return plan.draft(self, cache, token, 1)[1]
        return next(self._drafted(cache, token, 1))

    def _complete(
        self,
        call: Extension,
        input_ids: Tensor,
        hidden: Tensor,
        *,
        embeds: Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        """As the definition's; behind a compiled step the pairs are noted, and written in compiled code later."""
        if compiled and note_pairs(self, call.cache, call.segments, hidden):
            call.hidden = hidden
        else:
            super()._complete(call, input_ids, hidden, embeds=embeds)

    def _draft_plan(self, cache: HybridCache) -> MTPPlan | None:
        plan, state = available_mtp_plan(self), cache.unwritten_mtp
        return plan if plan is not None and state is not None and plan.supports(state) else None

    def _checked_draft(self, cache: HybridCache, token: Tensor) -> Tensor:
        """The token ids (b,). Raises: as `draft`."""
        cache.check(self.config)
        if cache.unwritten_mtp is None or self.mtp is None or cache.hidden is None or not min(cache.lengths):
            raise ValueError("A draft needs a cache that was made with mtp=True and holds at least one token a row.")
        token = as_ids(token, "token", ndim=1)
        if len(token) != cache.batch:
            raise ValueError(f"token has {len(token)} ids and the cache {cache.batch} rows: give one a row.")
        if not 0 <= int(token.min()) <= int(token.max()) < self.vocab_size:
            raise ValueError(f"token holds {int(token.min())} to {int(token.max())} of 0 to {self.vocab_size - 1}.")
        return token

    def _drafted(self, cache: HybridCache, token: Tensor, count: int) -> Iterator[Tensor]:
        """Logits (b, vocab) of the MTP layer behind `token`, then behind the most likely token of those, and so on."""
        assert self.mtp is not None
        assert cache.mtp is not None
        assert cache.hidden is not None
        past, hidden = [n - 1 for n in cache.lengths], cache.hidden[:, None]
        state = cache.mtp.share(max(past))  # continued here and forgotten
        for _ in range(count):
            segments = Segments.full(token[:, None]).after(past)
            rope = self._rotation(segments.positions, hidden.dtype)
            hidden, _ = self.mtp(hidden, self.embed_tokens(token[:, None]), rope, segments, state)
            logits = self.mtp.hook_logits(self.lm_head(hidden[:, 0]))
            yield logits
            token, past = logits.argmax(-1), [n + 1 for n in past]

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights are; if they are put there for each call alone, the CPU."""
        offloaded = getattr(getattr(self.embed_tokens, "_hf_hook", None), "execution_device", None)  # accelerate's
        if offloaded is not None:
            return torch.device(offloaded)
        here = (p.device for p in self.parameters() if p.device.type != "meta")
        return next(here, torch.device("cpu" if attached(self, self.embed_tokens) else "meta"))

    def _apply(self, fn: Any, recurse: bool = True) -> "Stepping":
        """As torch's, for `.to()` and the like; the plan, which holds the weights before, is let go first."""
        self.plan_cache = PlanCache()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's; the plan is let go first."""
        self.plan_cache = PlanCache()
        return super().load_state_dict(*args, **kwargs)
