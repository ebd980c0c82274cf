"""Parts of pretraining: data, settings, steps, checkpoints, reports."""
