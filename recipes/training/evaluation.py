"""What is measured of a model during a run: bits per byte of every source, MTP accuracy, recall of needles, samples."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from layers.segments import Segments
from qwen3next.mtp_depths import drafted_states
from recipes.training.data import ValidationBatches
from recipes.training.report import Row, compressed
from recipes.training.settings import Prepared, read_baselines
from recipes.training.steps import held_out_nats
from recipes.training.tokenizer import document_decoder, write_atomically

MTP_TOKENS = 4096  # held-out tokens on which drafts are compared with the text
NEEDLES = 8  # hidden in texts of each length
NEEDLE = 4  # tokens of its key, and of its value
# Means of a model's gates by the hook that sees them, and what is made of it.
GATES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "decay": ("blocks.*.linear_attn.hook_log_decay", torch.exp),
    "write_strength": ("blocks.*.linear_attn.hook_beta", lambda x: x),
    "attention_gate": ("blocks.*.self_attn.hook_gate", lambda x: x),
}


class HeldOut:
    """The held-out documents of every source.

    Attributes:
        batches: by the source's name.
    """

    def __init__(self, batches: dict[str, ValidationBatches]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Batches in one pass."""
        return sum(len(b) for b in self.batches.values())

    def part(self, tokens: int) -> "HeldOut":
        """A fixed random part with about so many tokens of all sources together."""
        return HeldOut({name: b.part(tokens // len(self.batches)) for name, b in self.batches.items()})

    def nats(self, model: q.Qwen3Next, *, precision: str) -> dict[str, dict[int, float]]:
        """By source and number of the document."""
        return {name: held_out_nats(model, b, precision=precision) for name, b in self.batches.items()}

    def bits_per_byte(self, nats: dict[str, dict[int, float]]) -> dict[str, float]:
        """Of every source; and of all bytes together, under the name "": see ValidationBatches.bits_per_byte."""
        found, bits, size = {}, 0.0, 0
        for name, b in self.batches.items():
            found[name] = b.bits_per_byte(sum(nats[name].values()))
            of_source = sum(map(b.bytes_of, b.documents))
            bits, size = bits + found[name] * of_source, size + of_source
        return found | {"": bits / size}

    def numbers(self) -> list[int]:
        """The places of these documents in the list of all sources' documents."""
        found, first = [], 0
        for b in self.batches.values():
            found += [first + document for document in b.documents]
            first += len(b.meta.val_bytes)
        return found


def held_out_of(data: Prepared, *, window: int, batch_size: int) -> HeldOut:
    """All held-out documents of a run's text, in batches of so many rows."""
    pairs = zip(data.sources, data.folders, strict=True)
    return HeldOut({s.name: ValidationBatches(folder, window=window, batch_size=batch_size) for s, folder in pairs})


def compared(held_out: HeldOut, nats: dict[str, dict[int, float]], out: Path) -> dict[str, Any]:
    """Bits per byte of all held-out documents, beside those of gzip and xz, which the run's folder `out` has.

    Returns: bits_per_byte, gzip, xz; sources, by name, if there are several; documents, each with its measures.
    """
    measured, baselines = held_out.bits_per_byte(nats), read_baselines(out)
    gzip, xz = compressed(baselines)
    single = [b.bits_per_byte(nats[name][i], document=i) for name, b in held_out.batches.items() for i in b.documents]
    documents = [{**b._asdict(), "model": x} for b, x in zip(baselines, single, strict=True)]
    whole = {"bits_per_byte": measured.pop(""), "gzip": gzip, "xz": xz, "documents": documents}
    return whole | {"sources": measured if len(measured) > 1 else {}}


def look(model: q.Qwen3Next, part: HeldOut, *, precision: str, mtp_depths: int, needles: Sequence[int]) -> Row:
    """The measures of a validation: val_bits_per_byte (also of each source), mtp_accuracy, needle recall by length.

    The model's mode and the random generators stay as they are.
    """
    training = model.training
    model.eval()
    try:
        measured = part.bits_per_byte(part.nats(model, precision=precision))
        row: Row = {"val_bits_per_byte": measured.pop("")}
        if len(measured) > 1:
            row |= {f"val_bits_per_byte/{name}": value for name, value in measured.items()}
        batches = next(iter(part.batches.values()))
        if model.mtp is not None:
            shares = mtp_accuracy(model, batches, precision=precision, depths=mtp_depths)
            row |= {f"mtp_accuracy/{depth}": share for depth, share in enumerate(shares, start=1)}
        row |= {f"needle/{n}": needle_recall(model, batches.tokens, n, precision=precision) for n in needles}
        row |= gates(model, batches, precision=precision)
    finally:
        model.train(training)
    return row


@torch.no_grad()
def mtp_accuracy(model: q.Qwen3Next, batches: ValidationBatches, *, precision: str, depths: int) -> list[float]:
    """Share of places where the MTP layer's most likely token is the text's, at each depth.

    The layer is given the text's tokens, not its own, so that each depth is measured behind true tokens.
    """
    hits, places, seen = [0] * depths, [0] * depths, 0
    device = model.embed_tokens.weight.device
    for batch in batches:
        ids, segments = batch.input_ids.to(device), Segments.from_document_ids(batch.document_ids.to(device))
        with _autocast(device, precision):
            hidden = model(ids, segments=segments, logits_to_keep=1).hidden
            states, _ = drafted_states(model, hidden, ids, segments, depths)
            for depth, x in enumerate(states):
                place = segments.next_is_same(depth + 2)
                target = ids.roll(-depth - 2, dims=1)[place]
                guess = torch.cat([model.lm_head(rows).argmax(-1) for rows in x[place].split(512)] or [target])
                hits[depth] += int((guess == target).sum())
                places[depth] += len(target)
        seen += ids.numel()
        if seen >= MTP_TOKENS:
            break
    return [hit / max(n, 1) for hit, n in zip(hits, places, strict=True)]


def check_needles(held_out: HeldOut, needles: Sequence[int]) -> None:
    """Raises: ValueError for a length at which a needle cannot be hidden in the held-out tokens."""
    least, most = 4 * NEEDLE, len(next(iter(held_out.batches.values())).tokens)
    for length in needles:
        if not least <= length <= most:
            raise ValueError(
                f"A needle cannot be hidden in {length} tokens of {most} held-out ones: "
                f"choose --needles from {least} to {most}."
            )


@torch.no_grad()
def needle_recall(model: q.Qwen3Next, tokens: np.ndarray, length: int, *, precision: str) -> float:
    """Share of a needle's value tokens that the model predicts, in texts of `length` tokens.

    A text is a stretch of held-out tokens. A key and a value of random tokens stand at a random place of it, and the
    key again at its end; the value that follows is predicted token by token. Chance is 1 / vocabulary.
    """
    generator = np.random.default_rng([length, 0])
    hits, device = 0, model.embed_tokens.weight.device
    for _ in range(NEEDLES):
        begin = int(generator.integers(0, len(tokens) - length + 1))
        text = tokens[begin : begin + length].astype(np.int64)
        key, value = generator.integers(0, model.vocab_size, (2, NEEDLE))
        at = int(generator.integers(0, length - 4 * NEEDLE + 1))
        text[at : at + NEEDLE], text[at + NEEDLE : at + 2 * NEEDLE] = key, value
        text[-2 * NEEDLE : -NEEDLE], text[-NEEDLE:] = key, value
        with _autocast(device, precision):
            logits = model(torch.from_numpy(text)[None].to(device), logits_to_keep=NEEDLE + 1).logits
        hits += int((logits[0, :-1].argmax(-1).cpu() == torch.from_numpy(value)).sum())
    return hits / (NEEDLES * NEEDLE)


def gates(model: q.Qwen3Next, batches: ValidationBatches, *, precision: str) -> Row:
    """Means over layers and the first held-out rows: decay a token, write strength, and attention's gate."""
    batch = next(iter(batches))
    device = model.embed_tokens.weight.device
    found: Row = {}
    ids, segments = batch.input_ids[:2].to(device), Segments.from_document_ids(batch.document_ids[:2].to(device))
    names = {name for name, _ in model.named_modules()}
    for measure, (pattern, of) in GATES.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            continue
        with torch.no_grad(), _autocast(device, precision):
            _, cache = model.run_with_cache(ids, segments=segments, names_filter=pattern)
        values: list[Tensor] = [of(x.float())[segments.mask].mean() for x in cache.values()]
        found[measure] = float(torch.stack(values).mean())
    return found


def write_samples(model: q.Qwen3Next, tokenizer: Tokenizer, held_out: HeldOut, path: Path, *, count: int) -> None:
    """Write the beginnings of held-out documents, and how the model goes on, greedily and with a seed at 0.8."""
    decode, parts = document_decoder(tokenizer), ["# Samples\n"]
    batches = next(iter(held_out.batches.values()))
    for document in list(batches.documents)[:count]:
        begin, end = batches.starts[document : document + 2].tolist()
        prompt = batches.tokens[begin : min(begin + 64, end - 1)]
        if not len(prompt):
            continue
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(model.embed_tokens.weight.device)
        parts.append(f"\n## {batches.meta.val_names[document]}\n\n```\n{decode([prompt])[0]}\n```\n")
        for temperature in (0.0, 0.8):
            text = q.generate(model, ids, max_new_tokens=64, temperature=temperature, seed=0)[0, ids.shape[1] :]
            kept = np.array([i for i in text.tolist() if i < batches.meta.vocab_size and i != batches.meta.eos_id])
            parts.append(f"\nTemperature {temperature}:\n\n```\n{decode([kept.astype(np.uint32)])[0]}\n```\n")
    write_atomically(path, "".join(parts).encode())


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
