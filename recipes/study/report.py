"""Write the report of a study from its runs: one JSON file, a table of claims, pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import qwen3next as q
from recipes.study.claims import Verdict, ladder_runs, value_of, verdicts
from recipes.study.extrapolate import LENGTHS, rise, yarn_cost
from recipes.study.maps import draw_maps, head_averages, text_prompt, toy_prompt
from recipes.study.pictures import NAMES, arms_in, draw_bars, draw_curves, draw_ladder, draw_lengths
from recipes.study.run import RESULT, write_json
from recipes.study.text import bos_id
from recipes.training.tokenizer import load_tokenizer, write_atomically

Runs = Sequence[Mapping[str, Any]]

PROMPT = "def read(self, size=-1):\n    if self.closed:\n        raise ValueError('read of a closed file')\n    return"
COLUMNS = (
    *("first_token_attention", "sink_rate", "massive_activation", "massive_ratio", "residual_norm_ratio"),
    *("value_norm_ratio", "gate_mean", "gate_closed"),
)
ALIKE = ("steps", "batch_size", "accumulate", "window", "tokenizer")  # equal in all runs of an experiment
IN_WORDS = NAMES | {
    "spikes": "loss spikes over 0.1 nats",
    "outliers": "losses beyond 6 standard deviations",
    "rate_penalty": "loss at the highest rate less the best",
    "rise": "loss beyond the extended length less that before",
    "yarn_cost": "loss that YaRN costs below it",
}


def gather(out: Path, also: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Every finished run below a folder, with its losses by position if they were measured.

    Args:
        also: results.json files of other reports. A run in several places is taken from the folder, else from the
            first of these files.
    Raises: ValueError if there is no run, a result cannot be read, or runs of an experiment are not comparable.
    """
    runs = []
    for path in sorted(out.glob(f"*/*/{RESULT}")):
        try:
            run = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a valid result ({error}): delete it to repeat that run.") from error
        lengths = path.with_name(LENGTHS)
        if lengths.is_file():
            run["lengths"] = json.loads(lengths.read_bytes())
            run["final"] |= {"rise": rise(run["lengths"]), "yarn_cost": yarn_cost(run["lengths"])}
        runs.append({"folder": str(path.parent.relative_to(out)), **run})
    for path in also:
        known = {run["folder"] for run in runs}
        runs += [run for run in _reported(path) if run["folder"] not in known]
    runs.sort(key=lambda run: run["folder"])
    refuse_incomparable(runs)
    if not runs:
        raise ValueError(f"There are no finished runs in {out}: run the toy or the lm experiment first.")
    return runs


def _reported(path: Path) -> list[dict[str, Any]]:
    """The runs of a report's results.json."""
    needed = {"folder", "kind", "arm", "seed", "final", "training", "curve", "settings", "data"}
    try:
        runs = json.loads(path.read_bytes())["runs"]
        if all(run.keys() >= needed for run in runs):
            return runs
        reason = "a run in it lacks required keys"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path} is not the results.json of a report ({reason}): give one that `report` wrote.")


def refuse_incomparable(runs: Runs) -> None:
    """Raises: ValueError if an experiment's runs differ in more than arm, seed, rate, precision and machine."""
    first: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        other = first.setdefault(run["kind"], run)
        pairs = {name: (other["settings"][name], run["settings"][name]) for name in ALIKE}
        if run["kind"] != "toy":  # the toy's sequences depend on the seed
            pairs["text"] = other["data"], run["data"]
        for name, (a, b) in pairs.items():
            if a != b:
                raise ValueError(
                    f"{other['folder']} and {run['folder']} differ in {name} ({a} and {b}), so their arms cannot be "
                    "compared: report them separately."
                )


def report(out: Path, console: Console, also: Sequence[Path] = ()) -> Path:
    """Write results.json, table.md and the pictures into out/report. Returns that folder.

    Attention maps are drawn if both models of a seed are in `out`.
    """
    runs = gather(out, also)
    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {"runs": runs})
    write_atomically(folder / "table.md", tables(runs).encode())
    draw(runs, out, folder)
    console.print(f"{len(runs)} runs: {folder}/table.md, results.json, and the pictures.", highlight=False)
    return folder


def draw(runs: Runs, out: Path, folder: Path) -> None:
    """Draw all pictures that the runs allow."""
    for kind in dict.fromkeys(run["kind"] for run in runs):
        mine = [run for run in runs if run["kind"] == kind]
        seeds = len({run["seed"] for run in mine})
        about = f"{kind}: {mine[0]['parameters']:,} parameters, {mine[0]['tokens']:,} tokens"
        about = f"{about}, {seeds} seed{'s' * (seeds > 1)}"
        if kind == "ladder":
            draw_ladder(mine, folder / "ladder.png", title=about)
            continue
        if kind == "extension":
            if any("lengths" in run for run in mine):
                draw_lengths(mine, folder / "extension.png", title=about)
            continue
        draw_curves(mine, folder / f"curves-{kind}.png", title=about)
        if any(run["final"] for run in mine):
            draw_bars(mine, folder / f"bars-{kind}.png", title=about)
        _maps(kind, mine, out, folder)


def _maps(kind: str, runs: Runs, out: Path, folder: Path) -> None:
    """Draw attention maps of the baseline and the elementwise gate, for the first seed that ran both."""
    pair = ("baseline", "g1_elementwise")
    for seed in sorted({run["seed"] for run in runs}):
        places = {r["arm"]: out / r["folder"] / "model" for r in runs if r["seed"] == seed and r["arm"] in pair}
        if places.keys() != set(pair) or not all(place.is_dir() for place in places.values()):
            continue
        if kind == "toy":
            ids, tokens = toy_prompt()
        else:
            tokenizer = load_tokenizer(out / "text" / "tokenizer")
            ids, tokens = text_prompt(tokenizer, PROMPT, bos_id(tokenizer))
        averages = {arm: head_averages(q.load(places[arm]).eval(), ids) for arm in pair}
        draw_maps(averages, tokens, folder / f"maps-{kind}.png")
        return


def tables(runs: Runs) -> str:
    """The Markdown page: claims with their signs, then the figures of every arm."""
    lines = ["# Paper and here", "", *claim_table(runs), ""]
    for kind in dict.fromkeys(run["kind"] for run in runs):
        lines += [f"## {kind}", "", *arm_table([run for run in runs if run["kind"] == kind]), ""]
    return "\n".join(lines)


def claim_table(runs: Runs) -> list[str]:
    """The table of claims: the paper's figures, those here, and the number of seeds in which the sign agrees."""
    lines = [
        "| what is smaller | in | than in | paper | experiment | here | sign agrees |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [_claim_row(v) for v in verdicts([*runs, *ladder_runs(runs)])]


def _claim_row(v: Verdict) -> str:
    c = v.claim
    paper = c.paper if isinstance(c.paper, str) else f"{c.paper[0]:g}, {c.paper[1]:g}"
    paper += " (perplexity)" if c.metric == "val_nats" else ""
    ties = sum(a == b for a, b in zip(v.arm, v.against, strict=True))
    agrees = f"{v.agree} of {len(v.seeds)}" + (f" ({ties} equal)" if ties else "")
    cells = (IN_WORDS[c.metric], c.arm, c.against, paper, v.kind, f"{spread(v.arm)}, {spread(v.against)}", agrees)
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """The mean, and for several values half the distance from minimum to maximum."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ± {half:.2g}"


def arm_table(runs: Runs) -> list[str]:
    """The final figures of every arm: mean and spread over seeds."""
    losses = [name for name in ("val_nats", "val_bits_per_byte", "copy_nats", "bigram_nats") if _has(runs, name)]
    names = [*losses, *(name for name in COLUMNS if _has(runs, name)), "spikes", "outliers", "gradient_norm_p999"]
    header = ["arm", "seeds", "parameters", *(name.replace("_", " ") for name in names), "diverged"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    rates = sorted({(run["rate"], run["precision"]) for run in runs})
    for arm in arms_in(runs):
        for rate, precision in rates:
            mine = [r for r in runs if (r["arm"], r["rate"], r["precision"]) == (arm, rate, precision)]
            if not mine:
                continue
            label = arm if len(rates) == 1 else f"{arm}, x{rate:g}, {precision}"
            cells = [label, str(len(mine)), f"{mine[0]['parameters']:,}"]
            for name in names:
                values = [x for x in (value_of(run, name) for run in mine) if x is not None]
                cells.append(spread(values) if values else "-")
            lines.append("| " + " | ".join([*cells, str(sum(r["diverged"] is not None for r in mine))]) + " |")
    return lines


def _has(runs: Runs, metric: str) -> bool:
    return any(value_of(run, metric) is not None for run in runs)
