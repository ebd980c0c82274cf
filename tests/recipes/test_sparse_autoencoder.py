"""The recipe from end to end at a tiny size; its autoencoder on data with a known answer."""

import io

import pytest
import torch
from conftest import small_model
from rich.console import Console
from safetensors.torch import load_file

from qwen3next.interp import ActivationRows, stream_activations
from recipes.sparse_autoencoder import Settings, main, run
from recipes.training.dictionary import SparseAutoencoder, fit, largest, measure, principal_components
from recipes.training.tokenizer import byte_tokenizer, save_tokenizer


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no demo/ here
    (tmp_path / "text").mkdir()
    for i in range(30):
        lines = (f"def f{i}_{j}(x):\n    return [x] + {i * j}\n" for j in range(8))
        (tmp_path / "text" / f"{i}.py").write_text("".join(lines))
    return Settings(data="text", tokens=3000, window=64, features=64, k=4, epochs=6, batch=256)


def test_a_random_model_is_said_to_be_one(text, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    scores = run(text, console=console)
    assert "a RANDOM model" in console.file.getvalue()
    assert 0.2 < scores.explained < 1
    assert 0 < scores.l0 <= 4
    report = (text.out / "report.md").read_text()
    assert "RANDOM" in report
    assert "Variance explained" in report
    assert "⟦" in report
    assert {p.name for p in text.out.iterdir() if p.is_file()} == {
        "report.md",
        "features.png",
        "autoencoder.safetensors",
    }
    saved = load_file(text.out / "autoencoder.safetensors")
    assert saved["decoder"].shape == (64, 128)
    again = run(text, console=console)  # reuses the activations; the seed gives the same dictionary
    assert again.explained == scores.explained
    assert all(torch.equal(saved[n], x) for n, x in load_file(text.out / "autoencoder.safetensors").items())


def test_a_checkpoint_and_l1(text, tmp_path):
    small_model(vocab_size=257, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    save_tokenizer(byte_tokenizer(), tmp_path / "model")
    options = "--model model --data text --tokens 1500 --window 64 --features 32 --k 0 --epochs 1 --batch 256 --layer 0"
    assert main(options.split()) == 0
    assert "L1 weight" in (text.out / "report.md").read_text()
    assert main(["--model", "nowhere"]) == 1


def test_what_is_sparse_is_found(tmp_path):
    """Rows are sums of three of 24 nearly orthogonal directions, which features explain far better than components."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 64, generator=g), dim=-1)
    model = small_model(num_hidden_layers=1, layer_types=("linear_attention",))
    weights = largest(torch.rand(97, 24, generator=g), 3)
    model.embed_tokens.weight.data = weights @ directions + 0.5
    ids = torch.randint(0, 97, (40, 4, 32), generator=g)
    for part, name in ((ids[:36], "train"), (ids[36:], "val")):
        list(stream_activations(model, part, tmp_path / name, "hook_embed", rows_per_shard=512, shuffle_shards=4))
    train, val = ActivationRows(tmp_path / "train"), ActivationRows(tmp_path / "val")
    torch.manual_seed(0)
    sae = SparseAutoencoder(64, 48, k=3)
    steps = list(fit(sae, train, "hook_embed", steps=300, batch=512, lr=5e-3, l1=0.0, seed=0))
    scores = measure(sae, val, "hook_embed")
    assert steps[-1].l0 <= 3
    assert scores.explained > 0.9
    assert scores.explained > principal_components(train, "hook_embed", val, 3) + 0.3
    feature = int(scores.density.argmax())
    row = int(scores.rows[feature, 0])
    codes = sae.encode(val.read("hook_embed", row, row + 1))
    torch.testing.assert_close(codes[0, feature], scores.best[feature, 0])
