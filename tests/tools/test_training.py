"""transformers' Trainer, TRL and accelerate on our classes, compared with transformers' own class."""

import itertools
import subprocess
import sys

import pytest
import torch
from common import checkpoint, text

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import qwen3next.hf  # noqa: E402, F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("m"))


@pytest.fixture(params=["ours", "transformers"])
def model(request, folder):
    kind = AutoModelForCausalLM if request.param == "ours" else transformers.Qwen3NextForCausalLM
    return kind.from_pretrained(folder)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SHARED = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
}
SGD = {"optim": "sgd", "learning_rate": 0.2}  # AdamW's first steps depend on the signs of gradients near zero
FOUND: dict[str, dict[str, list[float]]] = {}


def compare(name, model, values, tolerance=1e-4):
    """Both classes give these numbers; whichever comes second compares."""
    kind = type(model).__module__.split(".")[0]
    FOUND.setdefault(name, {})[kind] = values
    if len(FOUND[name]) == 2:
        a, b = FOUND[name].values()
        assert a == pytest.approx(b, abs=tolerance), name
        assert a[-1] < a[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_evaluation(folder, tmp_path, model, checkpointing):
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in ((torch.arange(16) * 7 + 5 * torch.arange(12)[:, None]) % 97).tolist()
    ]
    arguments = transformers.TrainingArguments(
        tmp_path, gradient_checkpointing=checkpointing, eval_strategy="steps", eval_steps=4, **SHARED | SGD
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows[:8], eval_dataset=rows[8:])
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    compare(f"trainer {checkpointing}", model, [*losses(trainer), *evaluated])
    assert evaluated[-1] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("packing", [False, True])
def test_sft(folder, tmp_path, model, packing):
    data = datasets.Dataset.from_dict({"text": [text(i, 9 + i) for i in range(12)]})
    arguments = trl.SFTConfig(tmp_path, max_length=32, packing=packing, packing_strategy="wrapped", **SHARED)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.train()
    compare(f"sft {packing}", model, losses(trainer))


def test_sft_packs_sequences_apart(folder, tmp_path):
    """TRL's default packing marks sequences by positions alone; transformers' class mixes them on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = datasets.Dataset.from_dict({"text": [text(i, 9 + i) for i in range(12)]})
    arguments = trl.SFTConfig(tmp_path, max_length=40, packing=True, **SHARED)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"].diff(dim=1) != 1).any()
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        begins = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        for begin, end in itertools.pairwise(begins):
            alone = model(batch["input_ids"][:, begin:end], use_cache=False).logits[0]
            assert (packed[begin:end] - alone).abs().max() <= 1e-4
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_dpo(folder, tmp_path, model):
    data = datasets.Dataset.from_dict(
        {
            key: [text(i + shift, n) for i in range(8)]
            for key, shift, n in (("prompt", 0, 5), ("chosen", 35, 6), ("rejected", 3, 6))
        }
    )
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(tmp_path, max_length=24, **SHARED),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    compare("dpo", model, losses(trainer), tolerance=1e-3)


def test_grpo(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = datasets.Dataset.from_dict({"prompt": [text(i, 6) for i in range(4)]})
    arguments = trl.GRPOConfig(
        tmp_path, num_generations=2, max_completion_length=6, generation_batch_size=4, **(SHARED | {"max_steps": 2})
    )
    before = model.lm_head.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()
    assert not torch.equal(model.lm_head.weight, before)


def test_pipeline(folder, model):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    answers = generate([text(1, 5), text(2, 9), text(3, 7)], max_new_tokens=6, do_sample=False)
    words = [answer[0]["generated_text"] for answer in answers]
    kind = type(model).__module__.split(".")[0]
    FOUND.setdefault("pipeline", {})[kind] = words
    assert all(words == other for other in FOUND["pipeline"].values())


PARALLEL = """
import sys, torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
import qwen3next.hf
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
ids = torch.arange(96).view(4, 24)[accelerator.process_index :: accelerator.num_processes]
for _ in range(2):
    optimizer.zero_grad()
    accelerator.backward(model(ids, labels=ids).loss)
    optimizer.step()
total = sum(p.double().abs().sum() for p in model.parameters())
sys.stdout.write(f"\\ntotal {total:.9f}\\n")
"""


SHARDED = """
import sys, torch, torch.distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
import qwen3next.hf
torch.distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ids = torch.arange(96).view(4, 24)[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
for _ in range(2):
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
total = sum(p.full_tensor().double().abs().sum() for p in model.parameters())
sys.stdout.write(f"\\ntotal {total:.9f}\\n")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("program", [PARALLEL, SHARDED], ids=["accelerate", "FSDP2"])
def test_two_processes_are_as_one(folder, tmp_path, program):
    """Over gloo: every parameter gets a gradient, also of experts that no token of a process chose."""
    script = tmp_path / "train.py"
    script.write_text(program)
    totals = []
    for n in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={n}",
            "--standalone",
            script,
            folder,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        totals += [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("total")]
    assert len(totals) == 3
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-6)
