"""Draw the figures of docs/interpretability.md from the model that `make demo` left.

python docs/figures/draw_interpretability.py [demo/run/model]
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import qwen3next as q
from qwen3next.interp import ActivationCache
from qwen3next.interp.pictures import draw_attention, draw_ledger, draw_lens

HERE = Path(__file__).parent
TEXT = """class Reader:
    def __init__(self, path):
        self.path = path
        self.lines = []

    def read(self):
        with open(self.path) as file:
"""


def main(folder: str = "demo/run/model") -> None:
    """Attention maps, ledger and lens of one text."""
    model, tokenizer = q.load(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    model.set_backend("attention", "eager")  # or there is no pattern to look at
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    tokens = [tokenizer.decode([i]) for i in ids[0].tolist()]
    _, acts = model.run_with_cache(ids)
    cache = ActivationCache(acts, model)
    maps = {"block 1, head 3: Gated DeltaNet": cache.implicit_attention(1)[0, 3]}
    maps["block 3, head 0: softmax"] = cache["pattern", 3][0, 0]
    draw_attention(maps, tokens=tokens).savefig(HERE / "attention_maps.png")
    draw_ledger(cache.ledger(1), tokens=tokens).savefig(HERE / "ledger.png", dpi=90)
    lens = cache.logit_lens(incl_mid=True, pos_slice=slice(0, 16))
    draw_lens(lens, decode=lambda i: tokenizer.decode([i]), tokens=tokens[:16]).savefig(HERE / "lens.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
