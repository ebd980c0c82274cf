"""Tokenizers for training from scratch: plain bytes, or a byte-level BPE trained on the text.

Each is a `tokenizers.Tokenizer`, saved as a `tokenizer.json` that transformers opens. Neither normalises text, so
decoding returns exactly the encoded text. `<|endoftext|>` ends a document.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # as Qwen's tokenizers call them

# The pre-tokenisation of Qwen2 and later, without their NFC normaliser, which would change the text.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte: ids 0 to 255 are the byte values, 256 is `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    # Without the regex the whole text is one word; without the prefix space nothing is added to it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer, byte for byte.

    Args:
        texts: training texts, read once.
        vocab_size: number of ids, including 256 bytes and `<|endoftext|>`. A small text may give fewer; the last id is
            always `<|endoftext|>`.
    Raises: ValueError for a vocab_size below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size is {vocab_size}; 256 bytes and {EOS} need 257, so choose that or more, or byte_tokenizer()."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,  # with 1, each rare word would become a token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that bytes that are not in the texts can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOS])  # after training, so that it has the last id
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a `tokenizer.json`, or the one in a folder.

    Raises: ValueError if the file does not exist or the tokenizers library cannot read it.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"No tokenizer at {file}: give a tokenizer.json or a folder that holds one.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every error
        raise ValueError(f"{file} is not a tokenizer of the tokenizers library ({error}): give another.") from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens.

    Raises: ValueError without an `<|endoftext|>` token; OSError for a full disk.
    """
    eos_id(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,  # older transformers would rewrite " ." to "." when decoding
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_atomically(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def eos_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document. Raises: ValueError if the tokenizer has no `<|endoftext|>`."""
    token = tokenizer.token_to_id(EOS)
    if token is None:
        raise ValueError(f"The tokenizer lacks {EOS}, which ends a document: add it as a special token.")
    return token


def document_encoder(tokenizer: Tokenizer) -> Callable[[Sequence[str]], list[NDArray[np.uint32]]]:
    """A function that encodes documents, without the final `<|endoftext|>`.

    Text that spells a special token is encoded as ordinary text, so that it cannot end a document. The tokenizer's
    padding, truncation and templates are not applied. The tokenizer itself is not changed.
    """
    if tokenizer.to_str() == byte_tokenizer().to_str():
        return lambda texts: [np.frombuffer(t.encode(), dtype=np.uint8).astype(np.uint32) for t in texts]

    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    plain.no_padding()
    plain.no_truncation()

    def encode(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    return encode


def document_decoder(tokenizer: Tokenizer) -> Callable[[Sequence[NDArray[np.uint32]]], list[str]]:
    """The inverse of `document_encoder`, as far as the tokenizer supports it."""
    if tokenizer.to_str() == byte_tokenizer().to_str():
        return lambda ids: [x.astype(np.uint8).tobytes().decode(errors="replace") for x in ids]
    return lambda ids: tokenizer.decode_batch([x.tolist() for x in ids], skip_special_tokens=False)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the complete old file or the complete new one.

    Raises: OSError for a full disk; the old file remains.
    """
    with explain_full_disk(path):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # otherwise a power failure could leave an empty file
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from other users of the folder
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's "No space left on device" into an error that names the path and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sentence = f"The disk that holds {path} is full: nothing was changed; free some space and run again."
        raise OSError(errno.ENOSPC, sentence) from error


def _byte_vocabulary() -> dict[str, int]:
    # ByteLevel shows printable Latin-1 bytes as themselves and the other 68 as the characters from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + position) for position, byte in enumerate(others)})
    return {characters[byte]: byte for byte in range(256)}
