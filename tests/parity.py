"""Compare our model with one of transformers, or with anything of the same interface."""

import torch
from safetensors.torch import load_file

from layers.segments import Segments


def tokens(t, b=2):
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(t))


def check_cached(their, ours):
    """A prompt, then token by token, then a second chunk of several tokens."""
    ids = tokens(90)
    cache, past = ours.new_cache(batch=2, max_len=90), None
    for begin, end in ((0, 67), (67, 68), (68, 69), (69, 80), (80, 90)):
        with torch.no_grad():
            expected = their(ids[:, begin:end], past_key_values=past, use_cache=True)
            got = ours(ids[:, begin:end], cache=cache).logits
        past = expected.past_key_values
        assert (got - expected.logits).abs().max() <= 1e-5


def check_left_padding(their, ours):
    ids, mask = tokens(70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = their(ids, attention_mask=mask).logits
        got = ours(ids, segments=Segments.from_mask(mask)).logits
    assert (got - expected)[mask == 1].abs().max() <= 1e-5


def stored(folder):
    """Every tensor of a folder's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
