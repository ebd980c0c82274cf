"""The commands of `qwen3next`, one module each; `qwen3next.cli` lists them."""
