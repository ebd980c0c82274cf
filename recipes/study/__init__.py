"""The gated-attention study: models, runs, metrics, pictures."""
