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
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
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
from recipes.scaling.pieces import piece_names
from recipes.scaling.settings import ScalingSettings
from recipes.scaling.sharding import apply, mesh_of, shard_fully
from recipes.scaling.weights import initialise
from recipes.training.data import LabelledBatch
from recipes.training.flops import training_flops
from recipes.training.report import Metrics, Row
from recipes.training.sources import Windows
from recipes.training.steps import learning_rate, parameter_groups

PARTS = ("loss", "lm", "mtp", "balance", "z", "logit_z")


class TitanModel(BaseModel):
    """Our model, which returns its share of the losses of the global batch.

    Losses are computed inside the forward, where weights are gathered.

    Attributes:
        batch: the processes with other parts of the batch; None: this one has all of it.
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
        self.batch: dist.ProcessGroup | None = None

    def verify_module_protocol(self) -> None:
        """torchtitan asks for modules of its own class; ours are torch's."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Give numbers to the divided model, which has memory but no values."""
        del buffer_device  # the model has no buffers
        if self.core.config.tie_word_embeddings:
            self.core.lm_head.weight = self.core.embed_tokens.weight  # `to_empty` parted them
        if self.settings.fresh:
            initialise(self.core, self.core.config, seed=self.settings.seed, folder=self.settings.init)

    def forward(
        self, input_ids: Tensor, document_ids: Tensor, labels: Tensor | None, counts: Counts | None, *, count: bool
    ) -> Any:
        """This process's share of the losses, in the order of PARTS, and its gradient-carrying sum in front.

        Args:
            counts: of the whole step; None: this micro-batch is all of it, and the counts of processes are added up.
            count: return the counts of this micro-batch alone.
        """
        segments = Segments.from_document_ids(document_ids)
        options: Any = {"segments": segments, "labels": labels, "mtp_depths": self.settings.mtp_depths}
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            if count:
                return self.core.loss_counts(input_ids, **options)
            sums = self.core.loss_sums(input_ids, **options)
        losses = sums.losses(self.core.config, self.added(sums.counts) if counts is None else counts)
        parts = [losses.total, *(getattr(losses, name) for name in PARTS[1:])]
        return losses.total, torch.stack([part.detach().float() for part in parts])

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
    core.recompute(*settings.recompute)
    apply(core, tensor=dims.get_optional_mesh("tp"), expert=dims.get_optional_mesh("ep"))
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


def optimizer_groups(config: q.ModelConfig, settings: ScalingSettings, layout: Layout) -> list[ParamGroupConfig]:
    """AdamW's groups: with and without decay, as `parameter_groups` says, and one for each mesh.

    One call of a fused optimizer takes tensors of one mesh.
    """
    with torch.device("meta"):
        model = q.Qwen3Next(config)
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for group in parameter_groups(model, settings.weight_decay):
        by_mesh: dict[str, list[str]] = {}
        for p in group["params"]:
            for piece in piece_names(config, names[id(p)]):
                mesh = mesh_of(piece, tensor=layout.tensor > 1, expert=layout.expert > 1)
                by_mesh.setdefault(mesh, []).append(piece)
        for some in by_mesh.values():
            pattern = "^core\\.(" + "|".join(name.replace(".", "\\.") for name in some) + ")$"
            adam = {"lr": settings.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": group["weight_decay"]}
            found.append(ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=adam))
    return found


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale all gradients so that their norm is at most `largest`; return the norm before.

    Norms are taken mesh by mesh: DTensors of different meshes cannot stand in one list.
    """
    meshes: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    square = 0.0
    for some in meshes.values():
        one = nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
        square += float(one.full_tensor() if isinstance(one, DTensor) else one) ** 2
    norm = math.sqrt(square) if math.isfinite(square) else square
    if math.isfinite(norm):
        for some in meshes.values():
            nn.utils.clip_grads_with_norm_(some, largest, torch.tensor(norm, device=some[0].device))
    return norm


class Pretrainer(Trainer):
    """torchtitan's Trainer with our step.

    Attributes:
        settings, report: set by `build`.
        report: where process 0 writes the metrics of a step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        settings: ScalingSettings | None = None

    report: Metrics | None = None

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
                some = model(*batch, None, count=True)
                counts = some if counts is None else counts + some
            counts = model.added(counts)
        parts = torch.zeros(len(PARTS), device=self.device)
        for batch in micro:
            with self.train_context():
                loss, own = model(*batch, counts, count=False)
                loss.backward()
            parts += own
        if model.batch is not None:
            dist.all_reduce(parts, group=model.batch)
        norm = clip_gradients([p for p in model.parameters()], self.config.training.max_norm)
        row: Row = {"step": self.step} | dict(zip(PARTS, parts.tolist(), strict=True))
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"Step {self.step}: the loss is {row['loss']}, so training stopped.")
        self.checkpointer.maybe_wait_for_staging()
        row |= {"gradient_norm": norm if math.isfinite(norm) else None, "skipped": not math.isfinite(norm)}
        if math.isfinite(norm):
            self.optimizers.step()
        self.lr_schedulers.step()
        if self.report is not None:
            self.report.add(row | {"lr": next(iter(rates.values())), "samples": self.dataloader.samples})
        self.metrics_processor.log(self.step, row["loss"], row["loss"], norm, extra_metrics=rates)


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
        optimizer=OptimizersContainer.Config(
            implementation="for-loop" if device_type == "cpu" else "fused",
            param_groups=optimizer_groups(config, settings, layout),
        ),
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
    for optimizer in trainer.optimizers:
        assert all(len({p.device_mesh for p in group["params"]}) == 1 for group in optimizer.param_groups)
    return trainer
