"""What pretraining runs use: data, settings, steps, checkpoints, reports."""
