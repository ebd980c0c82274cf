"""The tokenizer in the metadata of a GGUF file: Qwen's byte-level BPE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwen3next.files.json_files import write

_TAIL = r"|\p{N}| ?[^\s\p{L}%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
SPLITS = {  # by tokenizer.ggml.pre: the expression in the released tokenizer.json
    "qwen2": _CONTRACTIONS + r"\p{L}+" + _TAIL % "",
    "qwen35": _CONTRACTIONS + r"[\p{L}\p{M}]+" + _TAIL % r"\p{M}",
}
TEMPLATE = "tokenizer.chat_template"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer; None if the file has none. Raises: ValueError for one of another kind."""
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if tokens is None:
        return None
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in SPLITS or not isinstance(merges, list):
        known = ", ".join(SPLITS)
        raise ValueError(f"the tokenizer is {kind!r} with pre {pre!r}: 'gpt2' with {known} is read.")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError("the tokenizer's lists do not fit each other: copy the file again.")
    plain = {token: i for i, token in enumerate(tokens) if types[i] not in (CONTROL, USER_DEFINED, UNUSED)}
    added = [(i, token) for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)]
    try:
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        # An added token gets its id from the model's vocabulary.
        vocab = plain | {token: i for i, token in added}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizer cannot be built ({error}): copy the file again.") from error
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=types[i] == CONTROL, normalized=False) for i, t in added])
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of bos_token, eos_token and pad_token, as chat templates use them."""
    tokens, found = metadata.get("tokenizer.ggml.tokens") or [], {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(i) is int and 0 <= i < len(tokens):
            found[name] = tokens[i]
    return found


def write_text_files(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write what a GGUF file holds of tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder."""
    if (tokenizer := read_tokenizer(metadata)) is None:
        return
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", special_tokens(metadata))
    if isinstance(template := metadata.get(TEMPLATE), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
