"""lm-eval's `hf` model with prefix reuse and chunked scoring: `python -m qwen3next.evaluation` is lm-eval's command.

$ python -m qwen3next.evaluation run --model qwen3next --model_args pretrained=DIR --tasks hellaswag,arc_easy
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

import qwen3next.hf  # noqa: F401  our classes
from layers.norm import at_least_fp32
from qwen3next.cache.hybrid import HybridCache
from qwen3next.decoding.plan import MOST_TOKENS
from qwen3next.prefix.store import PrefixStore

CHUNK, ROWS = 1024, 256  # tokens of a forward; tokens whose logits are there at a time
Request = tuple[Any, list[int], list[int]]  # what lm-eval caches the answer by, context, continuation


@register_model("qwen3next")
class Qwen3NextLM(HFLM):
    """HFLM on this package's classes. Scores are those of `hf`, to rounding.

    A context is run once for all its continuations, and what contexts have in common once for all of them. Long
    continuations are scored in chunks, so that their logits are never held together. `batch_size` only concerns
    generation.

    Args:
        prefix_memory: for keys, values and states of contexts, as "2GiB".
        others: those of HFLM.
    """

    def __init__(self, *args: Any, prefix_memory: int | str = "2GiB", **options: Any):
        super().__init__(*args, **options)
        self._store = PrefixStore(self.model.core, budget=prefix_memory)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,  # noqa: ARG002  lm-eval passes it
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it.

        Raises: ValueError for an empty or too long continuation.
        """
        found: dict[int, tuple[float, bool]] = {}
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(cut)), key=lambda i: cut[i])  # common prefixes are neighbours
        with tqdm(total=len(order), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for context, group in itertools.groupby(order, key=lambda i: cut[i][0]):
                numbers = list(group)
                scores = self._scores(context, [cut[i][1] for i in numbers])
                for i, score in zip(numbers, scores, strict=True):
                    found[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(len(numbers))
        return [found[i] for i in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Context and continuation, the context without what does not fit the longest context, as HFLM cuts it."""
        if not continuation or len(continuation) > self.max_length:
            raise ValueError(
                f"A continuation has {len(continuation)} tokens: give 1 to {self.max_length}, or raise max_length."
            )
        return tuple((context + continuation)[-(self.max_length + 1) : -len(continuation)]), tuple(continuation)

    def _scores(self, context: tuple[int, ...], continuations: list[tuple[int, ...]]) -> list[tuple[float, bool]]:
        model, longest = self.model.core, max(map(len, continuations))
        run = self._store.prefill(torch.tensor(context, device=model.device), max_len=len(context) + longest)
        for _ in run:
            pass
        before = run.cache.last_logits
        assert before is not None
        caches = [run.cache, *run.cache.fork(len(continuations) - 1)] if len(continuations) > 1 else [run.cache]
        tokens = [torch.tensor(one, device=model.device) for one in continuations]
        short = [i for i, one in enumerate(tokens) if 1 < len(one) <= MOST_TOKENS]
        logits: dict[int, Tensor] = {}
        if short:
            rows = model.step_many([tokens[i][:-1] for i in short], [caches[i] for i in short], all_logits=True)
            logits = dict(zip(short, rows.split([len(tokens[i]) - 1 for i in short]), strict=True))
        scores = []
        for i, one in enumerate(tokens):
            if len(one) > MOST_TOKENS:
                scores.append(self._in_chunks(before, one, caches[i]))
            else:
                scores.append(_score([before, logits[i]] if i in logits else [before], one))
        return scores

    def _in_chunks(self, before: Tensor, tokens: Tensor, cache: HybridCache) -> tuple[float, bool]:
        """Of a long continuation behind `cache`; `before` are the logits of its first token."""
        model = self.model.core
        total, greedy = _score([before], tokens[:1])
        for chunk, targets in zip(tokens[:-1].split(CHUNK), tokens[1:].split(CHUNK), strict=True):
            hidden = model(chunk[None], cache=cache, logits_to_keep=1).hidden[0]
            for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
                part, same = _score([model.hook_logits(model.lm_head(rows[None]))[0]], wanted)
                total, greedy = total + part, greedy and same
        return total, greedy


def _score(logits: list[Tensor], tokens: Tensor) -> tuple[float, bool]:
    """Sum of the tokens' log-probabilities, and whether each is the most likely one."""
    rows = at_least_fp32(torch.cat(logits)).log_softmax(-1)
    return float(rows.gather(1, tokens[:, None]).sum()), bool((rows.argmax(-1) == tokens).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
