"""The model on many processes under torchtitan: layouts, sharding, the trainer, distributed checkpoints."""
