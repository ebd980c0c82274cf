"""The commands of `qwen3next`, a module each; `qwen3next.cli` has their table."""
