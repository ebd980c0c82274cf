"""GGUF files: blocks, names and orders, configuration, tokenizer, and hostile files."""

import random
import struct
from dataclasses import replace

import gguf_files
import numpy as np
import pytest
import torch
from conftest import small_model
from gguf_files import SIZES, decode, plain_bytes, random_blocks, tensors_of, text, value, write, write_model
from parity import tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import qwen3next as q
from qwen3next import cli
from qwen3next.chat.template import ChatTemplate
from qwen3next.checkpoints.convert import convert
from qwen3next.checkpoints.diff import diff
from qwen3next.checkpoints.gguf.blocks import KINDS, dequantised
from qwen3next.checkpoints.gguf.header import read_file
from qwen3next.checkpoints.gguf.write import to_gguf
from qwen3next.checkpoints.reader import open_checkpoint
from qwen3next.checkpoints.verify import verify
from qwen3next.commands.common import config_of, open_tokenizer
from qwen3next.files.tensor_files import Files

BLOCKS = [kind for kind, (numbers, _) in SIZES.items() if numbers > 1]
FAMILIES = {
    "qwen3_next": {"model_type": "qwen3_next"},
    "qwen3_5_moe_text": {"model_type": "qwen3_5_moe_text"},
    "qwen3_5_text": {"model_type": "qwen3_5_text", "num_experts": 0},
}
EXPERT_SIZES = ("moe_intermediate_size", "shared_expert_intermediate_size")
LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


def small(family="qwen3_next", **changes):
    """Four value heads for two key heads: an order that is not put back changes the logits."""
    return small_model(**(FAMILIES[family] | LAYERS | changes))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_decoded_as_ggml_defines_them(kind):
    blocks = random_blocks(np.random.default_rng(0), kind, 4 * SIZES[kind][0])
    found = {k.name: k for k in KINDS.values()}[kind]
    assert (found.numbers, found.nbytes) == SIZES[kind]
    expected = torch.tensor(np.array([decode(kind, block) for block in blocks]))
    assert torch.equal(dequantised(found, torch.from_numpy(blocks)), expected)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_those_of_the_gguf_package(kind):
    """Of any bytes, NaN and infinite scales included; in pieces too."""
    gguf = pytest.importorskip("gguf")
    found = {k.name: k for k in KINDS.values()}[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (5000, SIZES[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    mine = dequantised(found, torch.from_numpy(blocks)).view(torch.int32)
    theirs = torch.from_numpy(theirs).view(torch.int32)
    nan = (mine & 0x7FFFFFFF) > 0x7F800000
    assert torch.equal(nan, (theirs & 0x7FFFFFFF) > 0x7F800000)
    assert torch.equal(mine[~nan], theirs[~nan])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_a_model_comes_back(tmp_path, family, kind):
    model = small(family)
    write_model(tmp_path / "m.gguf", model, kind=kind)
    again = q.load(tmp_path / "m.gguf")
    ignored = {"extra", "mtp_num_hidden_layers", "initializer_range"}
    ignored |= {"num_experts_per_tok", *EXPERT_SIZES} if family == "qwen3_5_text" else set()
    found, given = vars(again.config), vars(model.config)
    assert {k: v for k, v in found.items() if k not in ignored} == {k: v for k, v in given.items() if k not in ignored}
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[kind]
    ours = dict(model.named_parameters())
    for name, p in again.named_parameters():
        exact = "norm" in name or name.endswith(("A_log", "dt_bias"))
        assert p.dtype == (torch.float32 if exact else dtype), name
        # Norms pass through 1 + w, A_log through exp and log, both in fp32.
        gap = 1e-6 if exact else 0
        assert (p.float() - ours[name].to(p.dtype).float()).abs().max() <= gap, name
    if kind == "F32":
        with torch.no_grad():
            assert (again(tokens(20)).logits - model(tokens(20)).logits).abs().max() < 1e-4
        if family != "qwen3_next":
            assert again.mtp is not None  # llama.cpp drops Qwen3-Next's


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_using_a_file(tmp_path, family):
    model = small(family)
    path = tmp_path / "m.gguf"
    write_model(path, model, kind="BF16")
    whole = q.load(path)
    ids = tokens(9)
    if family != "qwen3_5_text":
        disk, int8 = q.load(path, experts="disk"), q.load(path, experts="int8")
        with torch.no_grad():
            assert torch.equal(disk(ids).logits, whole(ids).logits)
            assert int8(ids).logits.isfinite().all()
        assert disk.experts_in != ""
    report = verify(path, values=True)
    assert report.problems == []
    assert config_of(str(path)) == whole.config
    convert(path, tmp_path / "folder")
    whole.save_pretrained(tmp_path / "saved")
    for folder in ("folder", "saved"):  # in the released layout
        again = q.load(tmp_path / folder)
        assert again.layout == q.Layout.released(model.config)
        for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name
    for d in diff(path, tmp_path / "folder"):  # what the file holds in F32 although the rest is BF16
        assert d.relative < 2**-8
        assert d.name.endswith(("conv1d.weight", "mlp.gate.weight", "shared_expert_gate.weight")), d.name


def quantised_file(path, model, kinds, metadata=None):
    """A file with a random mixture of types, and each tensor's numbers."""
    rng, tensors, meant = np.random.default_rng(0), {}, {}
    for name, x in tensors_of(model).items():
        fitting = [k for k in kinds if x.shape[-1] % SIZES[k][0] == 0]
        if x.ndim == 1 or "norm" in name or "conv1d" in name or not fitting:
            tensors[name], meant[name] = ("F32", tuple(x.shape), plain_bytes(x, "F32")), x
            continue
        kind = fitting[len(tensors) % len(fitting)]
        blocks = random_blocks(rng, kind, x.numel())
        values = dequantised({k.name: k for k in KINDS.values()}[kind], torch.from_numpy(blocks))
        tensors[name], meant[name] = (kind, tuple(x.shape), bytes(blocks)), values.view(x.shape)
    write(path, gguf_files.metadata_of(model.config) | (metadata or {}), tensors)
    return tensors, meant


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_quantised_types(tmp_path, family):
    """Rows of 256 numbers, so that K blocks fit; expert by expert from the files too."""
    model = small(family, hidden_size=256)
    _, meant = quantised_file(tmp_path / "m.gguf", model, BLOCKS)
    again = q.load(tmp_path / "m.gguf", dtype="float32")
    found = tensors_of(again)
    assert found.keys() == meant.keys()
    for name, x in meant.items():
        plain = x.ndim == 1 or "norm" in name
        assert (found[name] - x).abs().max() <= (1e-6 if plain else 0), name
    auto = q.load(tmp_path / "m.gguf")
    assert auto.embed_tokens.weight.dtype == torch.bfloat16
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert len(opened.formats) > 3
    if family != "qwen3_5_text":
        disk = q.load(tmp_path / "m.gguf", experts="disk", dtype="float32").blocks[0].mlp.experts
        gate_up, down = (torch.empty_like(p[5]) for p in again.blocks[0].mlp.experts.parameters())
        count = disk.read(5, gate_up, down)
        assert torch.equal(gate_up, again.blocks[0].mlp.experts.gate_up_proj[5])
        assert count < gate_up.nbytes  # the bytes of the blocks
    opened.files.close()


def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat, don't it?"] * 4, trainer)
    return tokenizer


def tokens_of(tokenizer, pre="qwen2"):
    import json

    state = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].get)
    types = [1] * len(vocab)
    for token, kind in (("<|im_end|>", 3), ("<tool>", 4), ("[PAD0]", 5)):
        vocab.append(token)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
        "tokenizer.ggml.eos_token_id": vocab.index("<|im_end|>"),
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    }


@pytest.mark.parametrize("pre", ["qwen2", "qwen35"])
def test_the_tokenizer_and_template_of_a_file(tmp_path, pre):
    plain = bpe()
    given = tokens_of(plain, pre)
    count = len(given["tokenizer.ggml.tokens"])
    model = small(vocab_size=count)
    write_model(tmp_path / "m.gguf", model, tokens=given)
    found = open_tokenizer(tmp_path / "m.gguf")
    words = "don't the cat 12 naïve\n\n 你好"
    assert found.decode(found.encode(words).ids) == words
    assert found.encode("the cat").ids == plain.encode("the cat").ids
    assert found.encode("12").ids == [plain.token_to_id("1"), plain.token_to_id("2")]  # digits one by one
    assert found.encode("a<|im_end|><tool>").ids[1:] == [count - 3, count - 2]
    assert found.decode([count - 3, count - 2]) == "<tool>"
    assert found.token_to_id("[PAD0]") is None
    assert q.load(tmp_path / "m.gguf").config.stop_tokens == (count - 3,)
    assert ChatTemplate.find(tmp_path / "m.gguf").render([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
    assert verify(tmp_path / "m.gguf").problems == []
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    assert open_tokenizer(tmp_path / "folder").encode(words).ids == found.encode(words).ids
    assert ChatTemplate.find(tmp_path / "folder").render([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"


def test_another_tokenizer_is_refused(tmp_path):
    given = tokens_of(bpe(), "llama-bpe")
    write_model(tmp_path / "m.gguf", small(vocab_size=400), tokens=given)
    with pytest.raises(ValueError, match=r"m.gguf: the tokenizer is 'gpt2' with pre 'llama-bpe'"):
        open_tokenizer(tmp_path / "m.gguf")


def test_commands_take_a_file(tmp_path, capsys):
    given, path = tokens_of(bpe()), str(tmp_path / "m.gguf")
    write_model(tmp_path / "m.gguf", small(vocab_size=len(given["tokenizer.ggml.tokens"])), tokens=given)
    assert cli.main(["generate", path, "--prompt", "the cat", "--max-new-tokens", "4", "--quiet"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["inspect", path]) == 0
    assert "1 x Gated DeltaNet" in capsys.readouterr().out
    assert cli.main(["verify", path]) == 0
    assert "valid: qwen3_next, without MTP" in capsys.readouterr().out


def test_yarn_and_arrays_of_heads(tmp_path):
    model = small("qwen3_5_moe_text")
    arch = "qwen35moe"
    changes = {
        f"{arch}.rope.scaling.type": "yarn",
        f"{arch}.rope.scaling.factor": 4.0,
        f"{arch}.rope.scaling.original_context_length": 1000,
        f"{arch}.attention.head_count_kv": [0, 2, 2],
    }
    write_model(tmp_path / "m.gguf", model, metadata=changes)
    config = q.load(tmp_path / "m.gguf").config
    assert config.rope_scaling.factor == 4.0
    assert config.rope_scaling.original_max_position_embeddings == 1000
    assert config.num_key_value_heads == 2
    assert config.rms_norm_eps == 1e-6


def split(path, parts, metadata, tensors):
    names = list(tensors)
    for i in range(parts):
        about = (metadata if i == 0 else {}) | {"split.no": i, "split.count": parts}
        some = {name: tensors[name] for name in names[i::parts]}
        write(path.with_name(f"m-{i + 1:05d}-of-{parts:05d}.gguf"), about, some)


def test_a_model_in_several_files(tmp_path):
    model = small()
    tensors = write_model(tmp_path / "whole.gguf", model)
    split(tmp_path / "x", 3, gguf_files.metadata_of(model.config), tensors)
    first = tmp_path / "m-00001-of-00003.gguf"
    a, b = q.load(first), q.load(tmp_path / "whole.gguf")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003.gguf is missing, one of 3 parts"):
        q.load(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="one of 3 parts: give it the name"):
        q.load(tmp_path / "renamed.gguf")


def without(name):
    return lambda meta, tensors: tensors.pop(name)


REFUSED = [
    (lambda m, _t: m.update({"general.architecture": "llama"}), "architecture 'llama' is not supported"),
    (lambda m, _t: m.pop("qwen3next.ssm.state_size"), "its metadata lacks qwen3next.ssm.state_size"),
    (lambda m, _t: m.update({"qwen3next.expert_gating_func": 2}), "expert_gating_func is 2"),
    (lambda m, _t: m.update({"qwen3next.rope.scaling.type": "linear"}), "RoPE scaling 'linear'"),
    (lambda m, _t: m.update({"qwen3next.attention.head_count_kv": [1, 2]}), "differs between layers"),
    (without("token_embd.weight"), "lacks token_embd.weight"),
    (without("blk.0.ssm_out.weight"), r"lacks model.layers.0.linear_attn.out_proj.weight, which its metadata requires"),
    (lambda _m, t: t.update({"blk.0.other.weight": t["blk.0.ssm_a"]}), "holds blk.0.other.weight"),
    (
        lambda _m, t: t.update({"blk.0.ssm_norm.weight": t["blk.0.ssm_a"]}),
        r"has shape \[4\], but its metadata",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_what_is_missing_or_unknown_is_named(tmp_path, change, sentence):
    model = small()
    tensors, metadata = write_model(tmp_path / "m.gguf", model), gguf_files.metadata_of(model.config)
    change(metadata, tensors)
    write(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(ValueError, match=sentence) as refused:
        q.load(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(refused.value)


def header(*, version=3, tensors=0, entries=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def info(name="x", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "empty": (b"", "does not begin as a GGUF"),
    "a zip": (b"PK" + bytes(100), "does not begin as a GGUF"),
    "another version": (header(version=9), "it has version 9"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it has version 50331648"),
    "many entries": (header(entries=2**63), "bytes early"),
    "many tensors": (header(tensors=2**63), "bytes early"),
    "a long key": (header(entries=1, rest=struct.pack("<Q", 2**62)), "bytes early"),
    "a long array": (header(entries=1, rest=text("a") + struct.pack("<IIQ", 9, 0, 2**60)), "bytes early"),
    "many strings": (header(entries=1, rest=text("a") + struct.pack("<IIQ", 9, 8, 2**60)), "strings"),
    "arrays of arrays": (header(entries=1, rest=text("a") + struct.pack("<IIQ", 9, 9, 1)), "arrays of type 9"),
    "an unknown type": (header(entries=1, rest=text("a") + struct.pack("<I", 99)), "type 99 is unknown"),
    "no UTF-8": (header(entries=1, rest=struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
    "a key twice": (header(entries=2, rest=2 * (text("a") + value(1))), "a is given twice"),
    "no alignment": (header(entries=1, rest=text("general.alignment") + value(0)), "alignment is 0"),
    "odd alignment": (header(entries=1, rest=text("general.alignment") + value(48)), "alignment is 48"),
    "no dimensions": (header(tensors=1, rest=info(dims=())), "has 0 dimensions"),
    "many dimensions": (header(tensors=1, rest=info(dims=(1,) * 9)), "has 9 dimensions"),
    "a huge tensor": (header(tensors=1, rest=info(dims=(2**62, 2**62))), "has shape"),
    "a size that overflows": (header(tensors=1, rest=info(dims=(2**32, 2**32))), "has shape"),
    "a dimension of zero": (header(tensors=1, rest=info(dims=(0,))), "has shape"),
    "half a block": (header(tensors=1, rest=info(dims=(33,), kind=8)), "x of type Q8_0 has shape"),
    "an unread type": (header(tensors=1, rest=info(kind=16)), "GGUF type 16, which is not read: F32, F16"),
    "beyond the end": (header(tensors=1, rest=info(offset=2**40)), "ends at byte"),
    "an odd offset": (header(tensors=1, rest=info(offset=4) + bytes(500)), "not aligned"),
    "an overlap": (header(tensors=2, rest=info() + info("y") + bytes(500)), "y overlaps x"),
    "a name twice": (header(tensors=2, rest=info() + info(offset=128) + bytes(500)), "x is given twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    content, sentence = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as refused:
        read_file(tmp_path / "m.gguf")
    assert str(refused.value).startswith(str(tmp_path / "m.gguf"))


def test_damaged_files_are_refused_or_open(tmp_path):
    """Random bytes of the header changed, and cuts: one sentence that names the file, or a model."""
    rng, path = random.Random(0), tmp_path / "m.gguf"
    write_model(path, small_model(**LAYERS, hidden_size=32, num_experts=2, num_experts_per_tok=1, vocab_size=11))
    original = path.read_bytes()
    begin = min(t.stored.begin for t in read_file(path).tensors.values())
    refused = 0
    for case in range(150):
        content = bytearray(original)
        if case % 5 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice([1, 1, 3]) if content else 0):
            content[rng.randrange(min(begin, len(content)))] = rng.randrange(256)
        path.write_bytes(content)
        sentence = ""
        try:
            q.load(path)
        except ValueError as error:
            sentence = str(error)
        refused += bool(sentence)
        assert not sentence or str(path) in sentence, sentence
        assert "\n" not in sentence
    assert refused > 50


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_what_is_written_is_what_the_converter_writes(tmp_path, family, kind):
    """Names, shapes, types and numbers against this file's own writer; then read again."""
    model = small(family)
    model.save_pretrained(tmp_path / "folder")
    assert (
        cli.main(["convert", str(tmp_path / "folder"), str(tmp_path / "m.gguf"), "--to=gguf", f"--gguf-type={kind}"])
        == 0
    )
    header, expected = read_file(tmp_path / "m.gguf"), tensors_of(model)
    assert header.tensors.keys() == expected.keys()
    assert (
        gguf_files.metadata_of(model.config).items()
        <= {key: float(str(np.float32(x))) if isinstance(x, float) else x for key, x in header.metadata.items()}.items()
    )
    with Files() as files:
        for name, t in header.tensors.items():
            x = expected[name]
            plain = x.ndim == 1 or "norm" in name or "conv1d" in name or "ffn_gate_inp" in name
            rows = kind.upper() if kind != "q8_0" or x.shape[-1] % 32 == 0 else "F16"
            assert t.kind.name == ("F32" if plain else rows), name
            assert t.shape == tuple(x.shape), name
            got = dequantised(t.kind, files.read(t.stored))
            if t.kind.name == "Q8_0":
                size = x.reshape(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(x.shape)
                assert ((got - x).abs() <= size / 127 * 0.51 + size * 2**-11).all(), name
            else:
                assert torch.equal(got, x.to(t.kind.dtype).float()), name
    assert q.load(tmp_path / "m.gguf")(tokens(9)).logits.isfinite().all()


def test_a_written_tokenizer_is_read_back(tmp_path):
    given = tokens_of(bpe())
    model = small(vocab_size=len(given["tokenizer.ggml.tokens"]) + 5, eos_token_id=3)
    write_model(tmp_path / "a.gguf", model, tokens=given | {"tokenizer.ggml.eos_token_id": 3})
    convert(tmp_path / "a.gguf", tmp_path / "folder")
    to_gguf(tmp_path / "folder", tmp_path / "b.gguf", kind="f32")
    to_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", kind="f32")
    for name in ("b.gguf", "c.gguf"):
        found, first = open_tokenizer(tmp_path / name), open_tokenizer(tmp_path / "a.gguf")
        assert found.get_vocab() == first.get_vocab()
        words = "don't the cat 12<|im_end|>"
        assert found.encode(words).ids == first.encode(words).ids
        assert ChatTemplate.find(tmp_path / name).source == given["tokenizer.chat_template"]
        assert q.load(tmp_path / name).config.stop_tokens == (3,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_gate": "headwise"}, "a variant of the released model"),
        ({"mlp_only_layers": (1,)}, "dense and sparse layers"),
        ({"layer_types": ("full_attention", "linear_attention")}, "no regular pattern"),
        ({"norm_topk_prob": False}, "not renormalised"),
    ],
)
def test_what_gguf_cannot_describe_is_refused(tmp_path, changes, sentence):
    small(**changes).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=sentence):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.oracle
def test_the_package_reads_what_is_written(tmp_path):
    """Q8_0 is the package's own, to the bit."""
    gguf = pytest.importorskip("gguf")
    model = small("qwen3_5_moe_text")
    model.save_pretrained(tmp_path / "m")
    expected = tensors_of(model)
    for kind in ("bf16", "q8_0"):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf", kind=kind)
        for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
            x = expected[t.name].contiguous().numpy()
            theirs = (
                gguf.quantize(x, t.tensor_type) if t.tensor_type.name in ("Q8_0", "BF16") else x.astype(t.data.dtype)
            )
            assert np.array_equal(np.asarray(t.data).reshape(theirs.shape), theirs), t.name


@pytest.mark.oracle
def test_the_package_reads_the_tests_files(tmp_path):
    """So that the writer of these tests is no reader's twin."""
    gguf = pytest.importorskip("gguf")
    model = small("qwen3_5_moe_text", hidden_size=256)
    tensors, meant = quantised_file(tmp_path / "m.gguf", model, BLOCKS)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert found.keys() == tensors.keys()
    for name, t in found.items():
        numbers = gguf.dequantize(t.data, t.tensor_type) if t.tensor_type.name != "F32" else t.data
        assert np.array_equal(np.asarray(numbers).reshape(meant[name].shape), meant[name].numpy()), name
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35MOE, 3)
    assert names.get_name("model.layers.0.linear_attn.in_proj_qkv") == "blk.0.attn_qkv"
    assert replace(KINDS[8]).name == gguf.GGMLQuantizationType(8).name
