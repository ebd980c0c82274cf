"""The claims of the papers, arm against arm, and the number of seeds here in which their sign agrees.

Figures are from arXiv:2505.06708 unless stated otherwise: tables 1 to 4 and 6, models of 15B and 1.7B parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """`metric` of `arm` is smaller than that of `against`.

    Attributes:
        paper: the two printed figures, or a text if the paper has no pair of figures of this metric.
        kinds: experiments that test the claim, by the beginnings of their names.
    """

    metric: str
    arm: str
    against: str
    paper: tuple[float, float] | str
    kinds: tuple[str, ...]


def _claims() -> tuple[Claim, ...]:
    g1, base, everywhere, text = "g1_elementwise", "baseline", ("toy", "lm"), ("lm-dense", "lm-moe")
    first = {
        base: 0.467,
        g1: 0.048,
        "g1_headwise": 0.073,
        "g1_head_shared": 0.301,
        "g2_elementwise": 0.297,
        "g1_constant": 0.364,
        "g1_ns_sigmoid": 0.451,
    }
    massive = {
        base: 1053.0,
        g1: 94.0,
        "g1_headwise": 98.0,
        "g1_head_shared": 286.0,
        "g2_elementwise": 125.0,
        "g1_constant": 471.0,
        "g1_ns_sigmoid": 892.0,
    }
    gates = {
        g1: 0.116,
        "g1_headwise": 0.172,
        "g1_head_shared": 0.271,
        "g2_elementwise": 0.221,
        "g1_constant": 0.335,
        "g1_ns_sigmoid": 0.653,
    }
    perplexity = {
        "more_kv_heads": 5.979,
        "more_query_heads": 5.953,
        "more_experts": 5.964,
        g1: 5.761,
        "g2_elementwise": 5.820,
        "g3_elementwise": 6.016,
        "g4_elementwise": 5.981,
        "g5_elementwise": 6.017,
        "g1_headwise": 5.792,
        "g2_headwise": 5.808,
        "g1_head_shared": 5.801,
        "g2_head_shared": 5.867,
        "g1_additive_silu": 5.821,
        "g1_silu": 5.822,
        "output_norm": 5.847,
        "output_silu": 5.975,
        "g1_additive_identity": 5.882,
        "g1_constant": 5.917,
        "g1_ns_sigmoid": 5.900,
        "switch_kv_8_top8": 5.847,
        "switch_kv_4_top4": 5.935,
        "switch_v_4_top4": 5.820,
        "switch_v_8_top2": 5.870,
        "switch_v_1_top1": 5.808,
    }
    hybrid = {"gdn_no_conv": 28.95, "gdn_no_gate": 29.12, "gdn_no_norm": 27.55, "deltanet": 30.87}
    found = [
        Claim("first_token_attention", a, base, (x, first[base]), everywhere) for a, x in first.items() if a != base
    ]
    found += [
        Claim("first_token_attention", g1, a, (first[g1], x), everywhere)
        for a, x in first.items()
        if a not in (base, g1)
    ]
    found += [Claim("massive_activation", a, base, (x, massive[base]), text) for a, x in massive.items() if a != base]
    found += [Claim("gate_mean", g1, a, (gates[g1], x), everywhere) for a, x in gates.items() if a != g1]
    found += [Claim("val_nats", a, base, (x, 6.026), text) for a, x in perplexity.items()]
    found += [
        Claim("spikes", g1, base, "none, 123 in 3T tokens", text),
        Claim("outliers", g1, base, "none, 123 spikes in 3T tokens", text),
        Claim("rate_penalty", g1, base, "perplexity +0.04, +1.77 at twice the rate", ("ladder",)),
        Claim("rate_penalty", "sandwich_norm", base, "perplexity -0.01, +1.77 at twice the rate", ("ladder",)),
        Claim("rise", g1, base, "RULER 66.6, 37.5 at 64k", ("extension",)),
        Claim("yarn_cost", g1, base, "RULER -6.9, -41.6 at 32k", ("extension",)),
    ]
    found += [Claim("val_nats", "gdn", a, (27.35, x), ("lm-hybrid",)) for a, x in hybrid.items()]
    return tuple(found)


CLAIMS = _claims()


@dataclass(frozen=True)
class Verdict:
    """The result of one experiment for one claim.

    Attributes:
        arm, against: the metric in each seed that ran both, in the order of `seeds`.
        agree: number of seeds in which it is smaller for the arm.
    """

    claim: Claim
    kind: str
    seeds: tuple[int, ...]
    arm: tuple[float, ...]
    against: tuple[float, ...]

    @property
    def agree(self) -> int:
        return sum(a < b for a, b in zip(self.arm, self.against, strict=True))


def value_of(run: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a run, or None if the run does not have it."""
    for place in (run["final"], run["training"], run):
        if isinstance(place.get(metric), (int, float)):
            return float(place[metric])
    return None


def verdicts(runs: Runs) -> list[Verdict]:
    """A verdict for every claim and every experiment that has runs of both arms with equal seeds."""
    found = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        values: dict[tuple[str, str], dict[int, float]] = {}
        for run in (r for r in runs if r["kind"] == kind):
            for metric in {claim.metric for claim in CLAIMS}:
                if (value := value_of(run, metric)) is not None:
                    values.setdefault((metric, run["arm"]), {})[run["seed"]] = value
        for claim in CLAIMS:
            if not kind.startswith(claim.kinds):
                continue
            a, b = (values.get((claim.metric, name), {}) for name in (claim.arm, claim.against))
            if seeds := tuple(sorted(a.keys() & b.keys())):
                found.append(Verdict(claim, kind, seeds, *(tuple(x[s] for s in seeds) for x in (a, b))))
    return found


def ladder_runs(runs: Runs) -> list[dict[str, Any]]:
    """Joins the ladder's runs into one for each arm, seed and precision. `rate_penalty` is the loss at the highest rate
    minus the best loss of any rate; the loss of a diverged run counts as infinite."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["kind"] == "ladder":
            groups.setdefault((run["arm"], run["seed"], run["precision"]), []).append(run)
    joined = []
    for (arm, seed, precision), members in groups.items():
        rates = {run["rate"]: float("inf") if run["diverged"] else run["training"]["loss"] for run in members}
        if len(rates) < 2 or min(rates.values()) == float("inf"):
            continue
        penalty = rates[max(rates)] - min(rates.values())
        joined.append(
            {
                "kind": f"ladder {precision}",
                "arm": arm,
                "seed": seed,
                "final": {"rate_penalty": penalty},
                "training": {"spikes": sum(run["training"]["spikes"] or 0 for run in members)},
                "rates": rates,
            }
        )
    return joined
