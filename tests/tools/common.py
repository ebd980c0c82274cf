"""A tiny checkpoint with a tokenizer, and texts, for tests of other packages on our classes."""

from conftest import small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(94)]


def checkpoint(folder, **changes):
    """A model of 97 tokens and a tokenizer of 94 words; weights as tests/conftest.py has them."""
    model = small_model(mtp_num_hidden_layers=0, initializer_range=0.03, eos_token_id=1, pad_token_id=0, **changes)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    return folder


def text(seed, length):
    """Words of a simple sequence, so that there is something to learn."""
    return " ".join(WORDS[(seed + 7 * i) % len(WORDS)] for i in range(length))
