"""The settings of a run on many processes: those of one process, and its layout."""

from dataclasses import asdict, dataclass
from typing import Any

from recipes.scaling.layout import Layout
from recipes.training.settings import FREE, Settings

# Settings that a resumed run may change, since neither losses nor the saved state depend on them.
LAYOUT = {"tensor", "expert", "replicate", "processes", "async_save", "compile"}


@dataclass(frozen=True)
class ScalingSettings(Settings):
    """Train a Qwen3-Next model on many GPUs, under torchtitan.

    `batch_size` is that of a micro-batch over all processes, and `accumulate` the micro-batches of a step, so that the
    same settings give the same losses in every layout and in `python -m recipes.pretrain`. See there for the others.

    Attributes:
        tensor: processes that share the heads, inner dimensions and vocabulary of a layer (TP).
        expert: processes over which the experts of a layer are divided (EP).
        replicate: groups of processes that each hold all weights (HSDP); within a group FSDP shards them.
        processes: start so many processes on this machine; 0: torchrun or Slurm has started them.
        async_save: write checkpoints in the background.
        compile: compile each block with torch.compile.
    """

    tensor: int = 1
    expert: int = 1
    replicate: int = 1
    processes: int = 0
    async_save: bool = True
    compile: bool = False

    def layout(self, world: int) -> Layout:
        return Layout(world, self.replicate, self.tensor, self.expert)


def refuse_single(settings: ScalingSettings) -> None:
    """Raises: ValueError for a setting that only `recipes.pretrain` knows what to do with."""
    for name, wanted, instead in (
        ("minutes", None, "give --steps"),
        ("balance", "batch", "use batch"),
        ("samples", 0, "sample from the exported model"),
    ):
        if getattr(settings, name) != wanted:
            raise ValueError(f"--{name.replace('_', '-')} is for one process only; on many {instead}.")


def comparable(settings: ScalingSettings) -> dict[str, Any]:
    """What must not change when a run resumes."""
    return {name: value for name, value in asdict(settings).items() if name not in FREE | LAYOUT}
