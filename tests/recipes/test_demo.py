"""The demo from end to end, within seconds, with a smaller model and corpus."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import qwen3next as q
import recipes.demo as demo
from recipes.demo import Demo, passed

NANO = q.presets.tiny(
    num_hidden_layers=2,
    full_attention_interval=2,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    num_experts=4,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files and the output of `python -m recipes.demo`."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").mkdir()
    for i in range(80):
        lines = (f"def f{i}_{j}(x):\n    return [x] + {i * j}\n" for j in range(20))
        (folder / "text" / f"{i}.py").write_text("".join(lines))
    (folder / "nano.json").write_text(json.dumps(NANO.to_dict()))
    options = Demo(
        minutes=0.03,
        out=folder / "demo",
        data=str(folder / "text"),
        preset=str(folder / "nano.json"),
        tokenizer="bpe:300",
        prompts=2,
    )
    console = Console(file=io.StringIO(), width=200)
    return options, demo.run(options, console=console), console.file.getvalue()


def test_what_it_leaves(finished):
    options, result, said = finished
    names = {path.name for path in options.out.iterdir()}
    assert names == {"loss.png", "samples.md", "report.md", "run"}
    assert f"qwen3next generate {options.out / 'run' / 'model'}" in said
    assert result.steps > 20
    assert q.load(options.out / "run" / "model").config.vocab_size <= 300  # the text has only few words


def test_samples_show_prompt_truth_and_both_continuations(finished):
    options, _, said = finished
    text = (options.out / "samples.md").read_text()
    assert text.count("\n## ") == 2
    for heading in ("Prompt:", "What follows in truth:", "Greedy:", "Drawn (temperature 0.8, top-p 0.95):"):
        assert text.count(heading) == 2
    blocks = text.split("~~~~text\n")[1:]
    prompt, truth = (block.split("\n~~~~")[0] for block in blocks[:2])
    name = text.split("## ")[1].split("\n")[0]
    assert name in said
    whole = (Path(options.data) / name).read_text()
    assert prompt in whole
    assert truth in whole.split(prompt, 1)[1]


def test_report_compares_file_by_file(finished):
    options, result, _ = finished
    report = (options.out / "report.md").read_text()
    for d in result.documents:
        assert f"| {d['name']} | {d['utf8_bytes']:,} | {d['model']:.3f} | {d['gzip']:.3f} | {d['xz']:.3f} |" in report
    assert f"**{result.bits_per_byte:.3f}** | **{result.gzip:.3f}** | **{result.xz:.3f}**" in report
    assert "| MTP |" in report
    loads = [line for line in report.splitlines() if line.startswith(("| 0 |", "| 1 |", "| MTP |"))]
    for line in loads:
        assert sum(float(x) for x in line.split("|")[2:-1]) == pytest.approx(4, abs=0.03)  # two decimals each


def test_unfinished_goes_on_and_finished_starts_anew(finished, monkeypatch):
    options, *_ = finished
    folder = options.out / "run"
    seen = []

    def train(settings, *, console):
        seen.append((settings.resume, (folder / "settings.json").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", train)
    kept = (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        demo.run(options)
    (folder / "result.json").write_bytes(kept)
    with pytest.raises(KeyboardInterrupt):
        demo.run(options)
    assert seen == [(True, True), (False, False)]


def test_a_folder_that_only_has_the_name_of_a_run_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")

    def train(settings, *, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", train)
    with pytest.raises(KeyboardInterrupt):
        demo.run(Demo(out=tmp_path))
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


def test_when_a_bar_was_passed():
    rows = [{"elapsed": 60.0 * i, "val_bits_per_byte": 3.0 - i} for i in range(3)] + [{"elapsed": 200.0}]
    assert passed(rows, 1.5) == "after 2.0 minutes"
    assert passed(rows, 0.5) == "not within this run"


def test_errors_are_sentences(capsys, tmp_path):
    assert demo.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "demo")]) == 1
    assert "There is nothing at" in capsys.readouterr().err
