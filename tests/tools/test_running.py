"""lm-eval, accelerate's offloading, tensor parallelism and torchao on our classes."""

import copy
import subprocess
import sys

import pytest
import torch
from common import checkpoint, text
from parity import tokens

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import qwen3next.hf  # noqa: E402, F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("m"))


def logits(model, t=21):
    with torch.no_grad():
        return model(tokens(t)).logits


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lm_eval_scores_as_on_transformers_class(folder, batch_size):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [(text(i, 3 + 2 * i), f" {text(i + 40, 2 + i % 3)}") for i in range(9)]
    found = []
    for kind in (AutoModelForCausalLM, transformers.Qwen3NextForCausalLM):
        harness = HFLM(pretrained=kind.from_pretrained(folder), tokenizer=tokenizer, batch_size=batch_size)
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found.append(harness.loglikelihood(requests))
        answers = harness.generate_until(
            [Instance("generate_until", {}, (pair[0], {"until": ["w3"], "max_gen_toks": 8}), 0) for pair in pairs[:4]]
        )
        found.append(answers)
    ours, our_answers, theirs, their_answers = found
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)
    assert our_answers == their_answers


def test_our_lm_eval_model_scores_as_hf(folder, monkeypatch):
    """Contexts that share prefixes, several continuations each, long and rolling texts, cut contexts, generation."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    import qwen3next.evaluation as evaluation

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shots = text(5, 70)
    pairs = [(f"{shots} {text(i, 4)}", f" {text(i + 40 + j, 1 + j)}") for i in range(3) for j in range(4)]
    pairs += [("", text(7, 3)), (text(3, 5), f" {text(11, 90)}"), (text(2, 150), f" {text(60, 9)}")]
    found = []
    for kind, options in ((evaluation.Qwen3NextLM, {"prefix_memory": "64MiB"}), (HFLM, {})):
        model = AutoModelForCausalLM.from_pretrained(folder)
        harness = kind(pretrained=model, tokenizer=tokenizer, max_length=128, batch_size=2, **options)
        calls = []
        run = model.core.hidden_states
        noted = lambda ids, *args, run=run, calls=calls, **more: calls.append(ids.numel()) or run(ids, *args, **more)  # noqa: E731
        monkeypatch.setattr(model.core, "hidden_states", noted)
        scores = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        rolling = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text(9, 200),), 0)])
        asked = [(pair[0], {"until": ["w3"], "max_gen_toks": 8}) for pair in pairs[:3]]
        answers = harness.generate_until([Instance("generate_until", {}, one, 0) for one in asked])
        found.append((scores, rolling, answers, sum(calls)))
    (ours, our_rolling, our_answers, our_tokens), (theirs, rolling, answers, tokens_run) = found
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=2e-4)
    assert our_rolling == pytest.approx(rolling, abs=1e-3)
    assert our_answers == answers
    assert our_tokens < 0.8 * tokens_run
    assert get_model("qwen3next") is evaluation.Qwen3NextLM
    harness = evaluation.Qwen3NextLM(pretrained=model, tokenizer=tokenizer, max_length=16)
    with pytest.raises(ValueError, match="A continuation has 20 tokens: give 1 to 16"):
        harness.loglikelihood([Instance("loglikelihood", {}, (text(1, 3), f" {text(2, 20)}"), 0)])


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offloads_to(folder, tmp_path, where):
    """Every module on disk or kept aside on the CPU, and brought for each call."""
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert next(model.parameters()).is_meta
    assert torch.equal(logits(model), expected)
    assert model.generate(tokens(9), max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_a_device_map_with_blocks_on_disk(folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() <= 1e-6


def test_torchao_quantises_the_linear_maps(folder):
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    errors = []
    for kind in (AutoModelForCausalLM, transformers.Qwen3NextForCausalLM):
        model = kind.from_pretrained(folder)
        before = logits(model)
        small = copy.deepcopy(model)
        torchao.quantize_(small, Int8WeightOnlyConfig())
        errors.append((logits(small) - before).abs().mean().item())
    assert 0 < errors[0] < 2 * errors[1]


SPLIT = """
import sys, torch
from transformers import AutoModelForCausalLM
import qwen3next.hf
ids = torch.arange(2, 23)[None]
with torch.no_grad():
    whole = AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).logits
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
    print("differs", (model(ids).logits - whole).abs().max().item(), flush=True)
    print("split", type(model.lm_head.weight).__name__, flush=True)
"""


def test_tensor_parallelism_with_two_processes(folder, tmp_path):
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("differs")]
    assert len(differences) == 2
    assert max(differences) <= 1e-5
