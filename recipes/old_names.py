"""Modules of this package by the names that they had before they moved into subpackages; kept for one release."""

from layers.deprecation import MovedModules

MODULES = {
    "recipes.benchmark_cases": "recipes.measure.benchmark_cases",
    "recipes.checkpoints": "recipes.training.checkpoints",
    "recipes.dictionary": "recipes.training.dictionary",
    "recipes.documents": "recipes.training.documents",
    "recipes.gpu_parity": "recipes.measure.gpu_parity",
    "recipes.measuring": "recipes.measure.measuring",
    "recipes.pace": "recipes.training.pace",
    "recipes.report": "recipes.training.report",
    "recipes.settings": "recipes.training.settings",
    "recipes.shards": "recipes.training.shards",
    "recipes.steps": "recipes.training.steps",
    "recipes.study_arms": "recipes.study.arms",
    "recipes.study_checkpoint": "recipes.study.checkpoint",
    "recipes.study_claims": "recipes.study.claims",
    "recipes.study_extrapolate": "recipes.study.extrapolate",
    "recipes.study_maps": "recipes.study.maps",
    "recipes.study_metrics": "recipes.study.metrics",
    "recipes.study_pictures": "recipes.study.pictures",
    "recipes.study_progress": "recipes.study.progress",
    "recipes.study_queue": "recipes.study.queue",
    "recipes.study_report": "recipes.study.report",
    "recipes.study_run": "recipes.study.run",
    "recipes.study_sizes": "recipes.study.sizes",
    "recipes.study_tasks": "recipes.study.tasks",
    "recipes.study_text": "recipes.study.text",
    "recipes.study_toy": "recipes.study.toy",
    "recipes.tokenizer": "recipes.training.tokenizer",
    "recipes.work": "recipes.measure.work",
}


def install() -> None:
    """Find these modules, with a warning."""
    MovedModules(MODULES, {}).install()
