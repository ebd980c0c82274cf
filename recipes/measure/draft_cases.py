"""The cases of `recipes.benchmark` and `recipes.speculation` about speculative decoding.

Each is compared with the model itself: with a step of one token, or with generation without drafts.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import qwen3next as q
from qwen3next.generation.generate import Generation
from qwen3next.generation.rounds import Report
from recipes.measure.benchmark_cases import Case

STEP, PLAIN = "a step", "no drafts"


def drafting(model: q.Qwen3Next, ids: Tensor, count: int, calls: int) -> Case:
    """Drafts of `count` tokens by the MTP layer behind a prompt (1, t), and single steps; `calls` of each a run."""
    cache, token = _behind(model, ids, mtp=True), ids[0, :1]
    stepped, one = _behind(model, ids, mtp=False), ids[:, :1]

    def us() -> None:
        for _ in range(calls):
            model.draft_tokens(cache, token, count)

    def step() -> None:
        for _ in range(calls):
            model.step(one, stepped)

    return Case(f"draft of {count}", count * calls, sides={"qwen3next": us, STEP: step})


def checking(model: q.Qwen3Next, ids: Tensor, count: int, calls: int) -> Case:
    """Steps of `count` tokens of one row with the logits after each, and steps of one token; `calls` of each."""
    cache, stepped, tokens = (*(_behind(model, ids, mtp=False) for _ in "ab"), ids[:, :count])

    def us() -> None:
        for _ in range(calls):
            model.step_all(tokens, cache)

    def step() -> None:
        for _ in range(calls):
            model.step(tokens[:, :1], stepped)

    return Case(f"{count} tokens in a step", count * calls, sides={"qwen3next": us, STEP: step})


def taking_back(model: q.Qwen3Next, ids: Tensor, count: int, back: int, calls: int) -> Case:
    """`back` of `count` tokens that one step brought are taken back, and single steps. Returns its own seconds."""
    cache, stepped, tokens = (*(_behind(model, ids, mtp=False) for _ in "ab"), ids[:, :count])

    def us() -> float:
        took = 0.0
        for _ in range(calls):
            with cache.revocable(count):
                logits = model.step_all(tokens, cache)
                begin = time.perf_counter()
                cache.take_back([back], logits=logits[:, count - 1 - back])
                took += time.perf_counter() - begin
        return took

    def step() -> None:
        for _ in range(calls):
            model.step(tokens[:, :1], stepped)

    return Case(f"take back {back} of {count}", calls, sides={"qwen3next": us, STEP: step})


def _behind(model: q.Qwen3Next, ids: Tensor, *, mtp: bool) -> q.HybridCache:
    """A cache that holds the prompt, with room for what a measurement adds."""
    cache = model.new_cache(1, max_len=ids.shape[1] + 4096, mtp=mtp)
    for _ in model.prefill(ids, cache):
        pass
    return cache


@dataclass(frozen=True)
class Way:
    """A way of generating.

    Attributes:
        draft_tokens, drafts, temperature: as for `q.Generation`.
    """

    draft_tokens: int | str
    drafts: str = "auto"
    temperature: float = 0.0

    def __str__(self) -> str:
        how = "greedy" if not self.temperature else f"temperature {self.temperature:g}"
        return f"generate, drafts {self.draft_tokens} by {self.drafts}, {how}"


class Generating:
    """Generation of `new` tokens behind a prompt (1, t) in one way, which returns the seconds after the prompt.

    Attributes:
        report: of the latest run.
        tokens: what it generated.
    """

    def __init__(self, model: q.Qwen3Next, ids: Tensor, new: int, way: Way):
        self.model, self.ids, self.new, self.way = model, ids, new, way
        self.report, self.tokens = Report(), list[int]()

    def __call__(self) -> float:
        way = self.way
        run = Generation(
            self.model,
            self.ids,
            max_new_tokens=self.new,
            temperature=way.temperature,
            seed=0,
            stop_tokens=[],
            draft_tokens=way.draft_tokens,
            drafts=way.drafts,
        )
        rounds = iter(run)
        next(rounds)  # the prompt, and the token after it
        begin = time.perf_counter()
        for _ in rounds:
            pass
        took = time.perf_counter() - begin
        self.report, self.tokens = run.report, run.rows[0].text[run.rows[0].prompt :]
        return took


def generating(model: q.Qwen3Next, ids: Tensor, new: int, way: Way) -> tuple[Case, Generating]:
    """Generation with drafts, and without; and what runs with drafts, for its report."""
    ours, plain = (Generating(model, ids, new, x) for x in (way, replace(way, draft_tokens=0)))
    return Case(str(way), new - 1, sides={"qwen3next": ours, PLAIN: plain}), ours


def with_mtp(preset: str, dtype: str, seed: int) -> q.Qwen3Next:
    """A preset with its MTP layer and random weights."""
    torch.manual_seed(seed)
    return q.Qwen3Next(q.presets.ALL[preset]()).to(getattr(torch, dtype)).eval()
