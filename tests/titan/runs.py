"""Runs of a tiny model for the tests: in one plain process, and under torchtitan on several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

import qwen3next as q
from recipes.pretrain import LOOK, Run, windows_of
from recipes.scaling.settings import ScalingSettings
from recipes.scaling.weights import random_tensors
from recipes.training.checkpoints import TrainingState, trained
from recipes.training.evaluation import held_out_of, look
from recipes.training.optimizers import WeightAverage, optimizers
from recipes.training.report import Live
from recipes.training.settings import model_config, prepare_data

HERE = Path(__file__).parent
STEPS = 10


def tiny(**changes):
    sizes = {
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "router_aux_loss_coef": 1e-2,
        "router_z_loss_coef": 1e-3,
        "logit_z_loss_coef": 1e-4,
    }
    return q.presets.tiny(**(sizes | changes))


def corpus(folder):
    """A few kilobytes of documents of unequal lengths, so that ranks have unequal numbers of targets."""
    (folder / "text").mkdir()
    for i in range(12):
        lines = (f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(1 + 3 * i))
        (folder / "text" / f"{i}.py").write_text("".join(lines))
    return folder / "text"


def settings_of(text, out, config, **changes):
    """Settings of a run, whose model is `config`."""
    preset = out.parent / f"{out.name}.json"
    preset.write_text(json.dumps(config.to_dict()))
    values = {
        "data": text if isinstance(text, tuple) else str(text),
        "tokenizer": "bytes",
        "preset": str(preset),
        "steps": STEPS,
        "batch_size": 4,
        "window": 32,
        "warmup": 2,
        "save_every": 5,
        "packing": "best_fit",  # windows end in padding
        "lr": 1e-3,
        "precision": "fp32",
        "model": ("vocab_size=264",),  # of 257 bytes and marks; a multiple for TP
        "tensorboard": False,
        "out": out,
    }
    return ScalingSettings(**(values | changes))


def words(settings):
    """The command line of settings."""
    found = []
    for name, value in vars(settings).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            found += [f"--{option}", *map(str, value)] if value else []
        elif value is not None and value != "":
            found += [f"--{option}", str(value)]
    return found


def environment(**more):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def command(given, *, planted="", timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "titan_worker", *given],
        env=environment(PLANTED=planted),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def titan(settings, *, planted="", check=True, timeout=300):
    """Run `recipes.titan`; returns the finished process."""
    done = command(words(settings), planted=planted, timeout=timeout)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def initial(config, seed=0):
    """The plain model with the weights that a run under torchtitan starts from."""
    model = q.Qwen3Next(config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in random_tensors(config, seed):
            own[name].copy_(values)
    return model


class Plain:
    """The same steps in one process: the loop of `recipes.pretrain` itself, from the same weights."""

    def __init__(self, settings):
        data = prepare_data(settings)
        self.settings, self.config = settings, model_config(settings, data.tokenizer)
        self.model, self.windows = initial(self.config, settings.seed), windows_of(settings, data)
        self.held_out = held_out_of(data, window=settings.window, batch_size=2 * settings.batch_size)
        self.optimizers = optimizers(self.model, settings)
        self.average = WeightAverage(self.model, settings.ema)
        state = TrainingState({}, {}, "", 1, total=settings.steps)
        parts = state, self.model, self.optimizers, self.windows, self.look, "fp32", None, Live(Console(quiet=True))
        self.run = Run(settings, *parts, average=self.average)

    def look(self):
        options = {"mtp_depths": self.settings.mtp_depths, "needles": self.settings.needles}
        return look(self.model, self.held_out.part(LOOK), precision="fp32", **options)

    def tensors(self, *, average):
        """Its state by the names of `recipes.training.checkpoints`; not copies."""
        own = trained(self.model)
        found = {f"model.{name}": p for name, p in own.items()}
        for name, p in own.items():
            for optimizer in self.optimizers:
                found |= {f"optimizer.{key}.{name}": x for key, x in optimizer.state.get(p, {}).items()}
        return found | ({f"average.{name}": x for name, x in self.average.tensors.items()} if average else {})

    def groups(self):
        """The options of each parameter's optimizer."""
        options = {id(p): group for o in self.optimizers for group in o.param_groups for p in group["params"]}
        own = trained(self.model)
        return {name: {k: v for k, v in options[id(p)].items() if k != "params"} for name, p in own.items()}

    def to(self, step):
        """The rows of the steps up to this one."""
        found = []
        while self.run.state.step < step:
            row = self.run.step()
            last = row["step"] == self.settings.steps
            found.append(row | (self.look() if last or row["step"] % self.settings.eval_every == 0 else {}))
        return found


MEASURES = ("val_bits_per_byte", "mtp_accuracy", "needle", "decay", "write_strength", "attention_gate")


def measures(row):
    """What a validation found."""
    return {name: x for name, x in row.items() if name.startswith(MEASURES)}


def differences(one, other):
    """The largest difference of losses and of norms."""
    pairs = list(zip(one, other, strict=True))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    norm = max(abs(a["gradient_norm"] - b["gradient_norm"]) for a, b in pairs)
    return loss, norm
