"""Fine-tuning: which tokens are predicted, LoRA against merged weights and PEFT's folder, exact resume."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import qwen3next as q
import recipes.pretrain as pretrain
from qwen3next.chat.template import ChatTemplate
from recipes import finetune
from recipes.finetune import FinetuneSettings
from recipes.training.chats import ChatWindows, encoded, read_conversations, rendered
from recipes.training.data import LabelledBatch
from recipes.training.low_rank import add_low_rank, merge_low_rank, write_low_rank
from recipes.training.report import read_metrics
from recipes.training.steps import accumulate_gradients
from recipes.training.tokenizer import byte_tokenizer, save_tokenizer

# Chat marks are plain bytes here; thinking is removed from answers that are not the last, as Qwen's templates do.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def folder(tmp_path):
    """A model of random weights with tokenizer and template, and twelve conversations."""
    torch.manual_seed(0)
    q.Qwen3Next(q.presets.tiny(num_hidden_layers=2, full_attention_interval=2)).save_pretrained(tmp_path / "model")
    save_tokenizer(byte_tokenizer(), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    chats = [[user(f"What is {i}?"), answer(f"{i} is é."), user("And?"), answer("No.")] for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats) + "\n")
    return tmp_path


@pytest.fixture
def settings(folder):
    return FinetuneSettings(
        init=str(folder / "model"),
        chats=str(folder / "chats.jsonl"),
        out=folder / "run",
        window=128,
        steps=6,
        batch_size=2,
        lr=1e-2,
        warmup=1,
        save_every=2,
        eval_every=3,
        validation_share=0.2,
        tensorboard=False,
        precision="fp32",
    )


def quiet():
    return Console(file=io.StringIO())


def test_the_assistant_alone_is_predicted():
    """From after the generation prompt to the end mark; two-byte letters, and a thought that the template removes."""
    template, messages = ChatTemplate(TEMPLATE), [user("a"), answer("bé"), user("c"), answer("<think>x</think>d")]
    text, spans, unseen = rendered(template, messages)
    assert unseen == 0
    assert [text[a:b] for a, b in spans] == ["bé</s>\n", "<think>x</think>d</s>\n"]
    one = encoded(byte_tokenizer(), text, spans)
    spoken = bytes(i for i, said in zip(one.ids, one.spoken, strict=True) if said).decode()
    assert spoken == "bé</s>\n<think>x</think>d</s>\n"
    text, spans, unseen = rendered(template, [user("a"), answer("<think>x</think>b"), user("c"), answer("d")])
    assert (unseen, [text[a:b] for a, b in spans]) == (1, ["d</s>\n"])


def test_windows_of_conversations(folder):
    """Every conversation once an epoch; labels are the assistant's tokens, none in padding or of the user."""
    template = ChatTemplate(TEMPLATE)
    found = read_conversations(
        folder / "chats.jsonl", template, byte_tokenizer(), window=128, validation_share=0.2, seed=0
    )
    assert len(found.train) + len(found.val) == 12
    windows = ChatWindows(found.train, window=128, seed=1)
    ids, documents, labels = windows.batch(0, len(windows))
    assert int((documents >= 0).sum()) == sum(len(one.ids) for one in found.train)
    said = labels != -100
    assert int(said.sum()) == sum(sum(one.spoken) for one in found.train)
    assert torch.equal(labels[said], ids[said])
    assert not bool((said & (documents < 0)).any())
    assert torch.equal(windows.batch(1, 1).labels, labels[1:2])


@pytest.mark.parametrize(
    "content, sentence",
    [("{}", "line 1 is no conversation"), ('{"messages": [1]}', "line 1"), ("", "no conversation with an answer")],
)
def test_files_that_do_not_serve(folder, content, sentence):
    (folder / "chats.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_conversations(
            folder / "chats.jsonl", ChatTemplate(TEMPLATE), byte_tokenizer(), window=9, validation_share=0.5, seed=0
        )


@pytest.mark.parametrize("balance", ["batch", "micro"])
def test_labels_in_parts_add_up(balance):
    """As one batch, in fp64; with labels a part may have no target although its tokens have next ones."""
    torch.manual_seed(0)
    model = q.Qwen3Next(q.presets.tiny(router_aux_loss_coef=0.0, initializer_range=0.1)).double()
    ids, documents = torch.randint(0, 256, (3, 12)), torch.zeros(3, 12, dtype=torch.long)
    labels = torch.where(torch.rand(3, 12) < 0.4, ids, -100)
    labels[1] = -100
    whole = model.loss(ids, labels=labels)
    micro = [LabelledBatch(*x) for x in zip(ids.split(1), documents.split(1), labels.split(1), strict=True)]
    row = accumulate_gradients(model, micro, precision="fp32", balance=balance)
    assert row["loss"] == pytest.approx(whole.total.item(), rel=1e-12)
    assert row["targets"] == whole.targets


def test_low_rank_is_a_change_of_weights(folder):
    """The folder, live, merged by us, and the trained model give the same logits; the frozen weights did not move."""
    model = q.load(folder / "model", dtype="float32")
    before, ids = {n: p.clone() for n, p in model.named_parameters()}, torch.arange(20)[None]
    names = add_low_rank(model, rank=3, alpha=6.0, targets=finetune.USUAL)
    assert "blocks.0.mlp.experts.gate_up_proj" in names
    assert not [name for name in names if "router" in name or "mtp" in name or "lm_head" in name]
    plain = q.load(folder / "model", dtype="float32")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    torch.manual_seed(1)
    for p in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.05)
    with torch.no_grad():
        expected = model(ids).logits
    write_low_rank(model, names, folder / "adapter")
    merge_low_rank(model, names)
    assert {n for n, _ in model.named_parameters()} == before.keys()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    live = q.load(folder / "model", dtype="float32", adapters=[folder / "adapter"])
    torch.testing.assert_close(live(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain(ids).logits).abs().max() > 0.01
    with pytest.raises(ValueError, match="No weight matches"):
        add_low_rank(plain, rank=2, alpha=2.0, targets="nothing")


@pytest.mark.parametrize("lora", [0, 4])
def test_it_learns_and_resumes_exactly(settings, monkeypatch, lora):
    """Interrupted between saves, then resumed: the same losses and weights; LoRA's state holds its matrices alone."""
    runs = [replace(settings, lora=lora, out=settings.out / name) for name in ("whole", "stopped")]
    result = finetune.finetune(runs[0], console=quiet())
    assert result["val_loss"] < result["first"]
    real, calls = pretrain.Run.step, []

    def step(run):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(pretrain.Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(runs[1], console=quiet())
    monkeypatch.undo()
    assert finetune.main(["--resume", "--out", str(runs[1].out)]) == 0
    losses = [[(row["step"], row["lm"], row["gradient_norm"]) for row in read_metrics(run.out)] for run in runs]
    assert losses[0] == losses[1]
    a, b, base = (dict(q.load(x / "model").named_parameters()) for x in (runs[0].out, runs[1].out, settings.out.parent))
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = {name for name in a if not torch.equal(a[name], base[name])}
    assert moved
    assert (runs[0].out / "model" / "chat_template.jinja").read_text() == TEMPLATE
    if lora:
        assert not [name for name in moved if "router" in name or "embed" in name]
        state = pretrain.newest(runs[0].out / "checkpoints").stat().st_size
        assert state < (settings.out.parent / "model" / "model.safetensors").stat().st_size
        assert (runs[0].out / "adapter" / "adapter_config.json").is_file()


def test_what_is_refused(settings, capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--chats", "x.jsonl"])
    assert "Give the model with --init" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="Muon"):
        replace(settings, lora=2, optimizer="muon")
    (settings.out.parent / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        finetune.finetune(settings, console=quiet())
