"""Pictures are drawn from the results of a forward, with tokens as labels; without matplotlib the error says so."""

import sys

import pytest
import torch
from conftest import small_model
from matplotlib.colors import to_rgba

from qwen3next.interp import ActivationCache
from qwen3next.interp.pictures import MOST_LABELS, draw_attention, draw_ledger, draw_lens

IDS = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(0))
TOKENS = [f"t{i}" if i else "      \n" for i in range(50)]


@pytest.fixture(scope="module")
def cache():
    model = small_model()
    model.set_backend("attention", "eager")
    _, acts = model.run_with_cache(IDS)
    return ActivationCache(acts, model)


def test_attention_maps(cache, tmp_path):
    signed, pattern = cache.implicit_attention(0)[0, 0], cache["pattern", 3][0, 0]
    figure = draw_attention({"a": signed, "$b$": pattern}, tokens=TOKENS)
    left, right = (axes.images[0] for axes in figure.axes[:2])
    assert left.get_cmap().name == "RdBu_r"
    assert left.get_clim()[0] == -left.get_clim()[1]
    assert right.get_clim()[0] == 0
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[:2] == ["·×6⏎", "t2"]
    assert len(labels) <= MOST_LABELS
    shown = left.get_array()
    assert shown.mask[0, 1:].all()
    assert float(shown[3, 2]) == pytest.approx(float(signed[3, 2]))
    figure.savefig(tmp_path / "map.png")
    assert to_rgba(figure.axes[0].get_facecolor()) == to_rgba("#f1f1f1")


def test_ledger(cache, tmp_path):
    figure = draw_ledger(cache.ledger(1), heads=[1, 3], tokens=TOKENS)
    assert [len(axes.lines) for axes in figure.axes] == [2] * 4
    line = torch.as_tensor(figure.axes[1].lines[1].get_ydata())
    torch.testing.assert_close(line, cache["beta", 1][0, :, 3])
    figure.savefig(tmp_path / "ledger.png")


def test_lens(cache, tmp_path):
    lens = cache.logit_lens(pos_slice=slice(0, 6))
    figure = draw_lens(lens, decode=lambda i: f"<{i}>", tokens=TOKENS[:6])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 5 * 6
    assert texts[-1] == f"<{int(cache['hook_logits'][0, 5].argmax())}>"
    figure.savefig(tmp_path / "lens.png")


def test_without_matplotlib_it_says_so(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_ledger(cache.ledger(0))
