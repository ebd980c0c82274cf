"""torchtitan's Trainer around our model, data and losses.

torchtitan brings the meshes, FSDP2, checkpoints, the optimizers' container and the loop; ours are the model, its
losses, the windows of text and the step. Classes here are what torchtitan asks for, no more.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import device_type
from torchtitan.trainer import Trainer

import qwen3next as q
from layers.segments import Segments
from qwen3next.losses import Counts
from recipes.scaling.layout import Layout
from recipes.scaling.optimizers import clip_gradients, optimizers_of
from recipes.scaling.regions import Group
from recipes.scaling.settings import ScalingSettings
from recipes.scaling.sharding import apply, compile_blocks, shard_fully
from recipes.scaling.weights import initialise
from recipes.training.data import LabelledBatch
from recipes.training.flops import training_flops
from recipes.training.optimizers import WeightAverage
from recipes.training.report import Metrics, Row
from recipes.training.skips import Skips
from recipes.training.sources import Windows
from recipes.training.steps import learning_rate

PARTS = ("loss", "lm", "mtp", "balance", "z", "logit_z", "targets")


class TitanModel(BaseModel):
    """Our model, which returns its share of the losses of the global batch.

    Losses are computed inside the forward, where weights are gathered.

    Attributes:
        batch: the processes with other parts of the batch; None: this one has all of it.
        tensor: the processes with other heads; None: this one has all of them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        architecture: dict[str, Any] = field(default_factory=dict)
        window: int = 0
        seed: int = 0
        init: str = ""
        fresh: bool = True
        mtp_depths: int = 1
        precision: str = "fp32"

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Nothing in torchtitan's configuration changes the model."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            config = q.ModelConfig.from_dict(self.architecture)
            return sum(p.numel() for p in model.parameters()), int(training_flops(config, seq_len))

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings = config
        self.core = q.Qwen3Next(q.ModelConfig.from_dict(config.architecture))
        self.batch: Group = None
        self.tensor: Group = None

    def verify_module_protocol(self) -> None:
        """torchtitan asks for modules of its own class; ours are torch's."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Give numbers to the divided model, which has memory but no values."""
        del buffer_device  # the model has no buffers
        if self.core.config.tie_word_embeddings:
            self.core.lm_head.weight = self.core.embed_tokens.weight  # `to_empty` parted them
        if self.settings.fresh:
            initialise(self.core, self.core.config, seed=self.settings.seed, folder=self.settings.init)

    def forward(self, work: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """`work(...)` of the inner model, while the weights outside of blocks are gathered."""
        return work(*given, **options)

    def counts(self, input_ids: Tensor, document_ids: Tensor, labels: Tensor) -> Counts:
        """What the losses of this micro-batch of this process are divided by."""
        with self._autocast(input_ids):
            return self.core.loss_counts(input_ids, **self._options(document_ids, labels))

    def losses(
        self, input_ids: Tensor, document_ids: Tensor, labels: Tensor, counts: Counts | None
    ) -> tuple[Tensor, Tensor]:
        """This process's share of the losses: their sum, which carries gradients, and the numbers that PARTS names.

        Args:
            counts: of the whole step; None: this micro-batch is all of it, and the counts of processes are added up.
        """
        with self._autocast(input_ids):
            sums = self.core.loss_sums(input_ids, **self._options(document_ids, labels))
        losses = sums.losses(self.core.config, self.added(sums.counts) if counts is None else counts)
        parts = [losses.total, *(getattr(losses, name) for name in PARTS[1:-1]), sums.counts.targets[0]]
        return losses.total, torch.stack([part.detach().double() for part in parts])

    def _options(self, document_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        segments = Segments.from_document_ids(document_ids)
        return {"segments": segments, "labels": labels, "mtp_depths": self.settings.mtp_depths}

    def _autocast(self, input_ids: Tensor) -> torch.autocast:
        return torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def added(self, counts: Counts) -> Counts:
        """The sum over the processes of the batch: one message of a few numbers, without gradients."""
        if self.batch is None:
            return counts
        vector = counts.vector().contiguous()
        dist.all_reduce(vector, group=self.batch)
        return counts.like(vector)


def parallelize(model: TitanModel, *, parallel_dims: Any, settings: ScalingSettings, **_others: Any) -> TitanModel:
    """Divide the model over torchtitan's meshes."""
    dims, core = parallel_dims, model.core
    tensor = dims.get_optional_mesh("tp")
    core.recompute(*settings.recompute)
    apply(core, tensor=tensor, expert=dims.get_optional_mesh("ep"))
    if settings.compile:
        compile_blocks(core)
    replicas = ["dp_replicate"] if dims.dp_replicate > 1 else []
    expert_data = dims.get_mesh([*replicas, "efsdp"]) if dims.ep > 1 else None
    shard_fully(
        model,
        core,
        data=dims.get_mesh([*replicas, "fsdp"]),
        expert_data=expert_data,
        force_sum=device_type == "cpu",
    )
    if dims.dp_enabled:
        model.batch = dims.get_mesh("batch").get_group()
    model.tensor = None if tensor is None else tensor.get_group()
    return model


class LossInModel(BaseLoss):
    """The model has computed its losses already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        del config, compile_config

    def __call__(self, pred: Any, labels: Any, *_others: Any, **_more: Any) -> Any:
        raise NotImplementedError("The losses of this model come from its forward.")


class NoTokenizer(BaseTokenizer):
    """Text is tokenized before training."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str | None = None) -> None:
        super().__init__()
        del config, tokenizer_path

    def encode(self, *_args: Any, **_kwargs: Any) -> list[int]:
        raise NotImplementedError("Tokenize with recipes.data.")

    def decode(self, *_args: Any, **_kwargs: Any) -> str:
        raise NotImplementedError("Detokenize with the run's tokenizer.")

    def get_vocab_size(self) -> int:
        return 0


class WindowLoader(BaseDataLoader):
    """This process's rows of each micro-batch. Its state is the number of windows that the run has seen."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        windows: Callable[[], Windows]

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_others: Any
    ) -> None:
        self.windows, self.samples = config.windows(), 0
        self.world, self.rank, self.size = dp_world_size, dp_rank, local_batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            batch = self.windows.batch(self.samples + self.rank * self.size, self.size)
            self.samples += self.world * self.size
            labels = batch.labels if isinstance(batch, LabelledBatch) else batch.input_ids
            yield {"input_ids": batch.input_ids, "document_ids": batch.document_ids}, labels

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = state_dict["samples"]


class Schedule(LRSchedulersContainer):
    """The learning rate of `recipes.pretrain`."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        settings: ScalingSettings | None = None

        def build(self, *, optimizers: Any, training_steps: int) -> "LRSchedulersContainer":
            assert self.settings is not None
            settings, last = self.settings, training_steps - 1

            def share(step: int) -> float:  # of the peak; after the last step there is no rate
                return learning_rate(min(step, last), training_steps, settings) / settings.lr

            return LRSchedulersContainer(optimizers, share)


def agreed(values: list[float], device: torch.device) -> list[float]:
    """The values of process 0 on all of them: what is decided by them is then decided alike."""
    vector = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(vector, src=0)
    return vector.tolist()


class Pretrainer(Trainer):
    """torchtitan's Trainer with our step.

    Attributes:
        report: where process 0 writes the metrics of a step.
        say: how process 0 prints a sentence.
        skips, average: which steps are skipped, and the average of the weights; parts of a checkpoint.
        look: measures the model on held-out text, on all processes together, every `looks_every` steps.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        settings: ScalingSettings | None = None

    report: Metrics | None = None
    say: Callable[[str], None] | None = None
    skips: Skips
    average: WeightAverage | None = None
    look: Callable[[nn.Module], Row] | None = None
    looks_every: int = 1

    def state_dict(self) -> dict[str, Any]:
        recent = {"recent": [list(row) for row in self.skips.recent]} if self.skips.deviations else {}
        return super().state_dict() | recent

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.skips.recent[:] = state_dict.get("recent", [])

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """One step over all micro-batches of all processes."""
        self.optimizers.zero_grad()
        rates = self.lr_schedulers.get_metrics()
        model: Any = self.model_parts[0]
        micro = []
        for _ in range(self.gradient_accumulation_steps):
            given, labels = next(data_iterator)
            micro.append([x.to(self.device) for x in (given["input_ids"], given["document_ids"], labels)])
        self.ntokens_seen += sum(ids.numel() for ids, *_ in micro)
        counts: Counts | None = None
        if len(micro) > 1:  # a first pass counts, as in recipes/training/steps.py
            for batch in micro:
                some = model(model.counts, *batch)
                counts = some if counts is None else counts + some
            counts = model.added(counts)
        parts = torch.zeros(len(PARTS), dtype=torch.float64, device=self.device)
        for batch in micro:
            with self.train_context():
                loss, own = model(model.losses, *batch, counts)
                loss.backward()
            parts += own
        if model.batch is not None:
            dist.all_reduce(parts, group=model.batch)
        found = dict(zip(PARTS, parts.tolist(), strict=True))
        targets = int(found.pop("targets"))
        if not targets:  # a step without a target has no losses, as in recipes.training.steps
            found = dict.fromkeys(found, 0.0)
        norm = clip_gradients([p for p in model.parameters()], self.config.training.max_norm) if targets else 0.0
        loss, norm = agreed([found["loss"], norm], self.device)
        if not math.isfinite(loss):
            raise FloatingPointError(f"Step {self.step}: the loss is {loss}, so training stopped.")
        try:
            why = self.skips.why(self.step, loss=loss, norm=norm, targets=targets)
        except FloatingPointError as error:
            raise FloatingPointError(f"Step {self.step}: {error}, so training stopped.") from None
        row: Row = {"step": self.step} | found | {"targets": targets, "skipped": bool(why)}
        row["gradient_norm"] = norm if math.isfinite(norm) else None
        self.checkpointer.maybe_wait_for_staging()
        if why and self.say is not None:
            self.say(why)
        if not why:
            self.optimizers.step()
            if self.average is not None:
                self.average.update(model, self.step)
        self.lr_schedulers.step()
        if self.look is not None and (self.step % self.looks_every == 0 or not self.should_continue_training()):
            row |= self.look(model)
        if self.report is not None:
            self.report.add(row | {"lr": next(iter(rates.values())), "samples": self.dataloader.samples})
        self.metrics_processor.log(self.step, loss, loss, norm, extra_metrics=rates)


def build(
    settings: ScalingSettings, config: q.ModelConfig, windows: Windows, layout: Layout, *, precision: str
) -> Pretrainer:
    """The trainer of a run, in a process that torchrun started.

    Raises: what torchtitan raises for an environment without a process group.
    """
    found = any(settings.out.glob("checkpoint/step-*/.metadata"))
    model = TitanModel.Config(
        architecture=config.to_dict(),
        window=settings.window,
        seed=settings.seed,
        init=settings.init,
        fresh=not found,  # else a checkpoint has all weights
        mtp_depths=settings.mtp_depths,
        precision=precision,
    )
    spec = ModelSpec(
        name="qwen3next",
        flavor=settings.preset,
        model=model,
        parallelize_fn=partial(parallelize, settings=settings),
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    steps = settings.steps
    assert steps is not None
    trainer = Pretrainer.Config(
        settings=settings,
        model_spec=spec,
        dump_folder=str(settings.out),
        loss=LossInModel.Config(),
        tokenizer=NoTokenizer.Config(),
        dataloader=WindowLoader.Config(windows=lambda: windows),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=False),
        optimizer=optimizers_of(config, settings, layout),
        lr_scheduler=Schedule.Config(settings=settings, warmup_steps=min(settings.warmup, steps)),
        training=TrainingConfig(
            local_batch_size=settings.batch_size // layout.data,
            global_batch_size=settings.batch_size * settings.accumulate,
            seq_len=settings.window,
            max_norm=settings.clip,
            steps=steps,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(
            data_parallel_replicate_degree=layout.replicate,
            data_parallel_shard_degree=layout.shard,
            tensor_parallel_degree=layout.tensor,
            expert_parallel_degree=layout.expert,
            spmd_backend="partial_dtensor",
            enable_sequence_parallel=False,
        ),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=settings.save_every,
            last_save_model_only=False,
            keep_latest_k=2,
            async_mode="async" if settings.async_save else "disabled",
        ),
        comm=CommConfig(train_timeout_seconds=600),  # its 100 s may be too short beside a slow disk
        debug=DebugConfig(seed=settings.seed, enable_structured_logging=False),
    ).build()
    trainer.skips, trainer.looks_every = Skips(settings.skip_spikes), settings.eval_every
    if settings.ema:
        trainer.average = WeightAverage(trainer.model_parts[0], settings.ema)
        trainer.checkpointer.states["average"] = trainer.average.tensors
    for optimizer in trainer.optimizers:
        assert all(len({p.device_mesh for p in group["params"]}) == 1 for group in optimizer.param_groups)
    return trainer
