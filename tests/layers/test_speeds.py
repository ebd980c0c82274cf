"""Which figures decide what "auto" picks: injected ones, so that no test depends on the machine that runs it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import small_model

import qwen3next as q
from layers.cpp import cpu
from layers.delta_rule import gated_delta_rule
from layers.dispatch import availability, backends, registry, speeds
from layers.norm import l2_normalise
from qwen3next import tuning
from qwen3next.cli import main

CPU = torch.device("cpu")


def figures(source="a test", **operations):
    """A table for fp32 without gradients: operation = {implementation: ratio}."""
    ratios = {
        (operation, "float32", False): {name: {256: ratio} for name, ratio in names.items()}
        for operation, names in operations.items()
    }
    return speeds.Figures(source, ratios)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(availability, "missing", lambda: None)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder of the user's, which is looked into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QWEN3NEXT_TUNED", "1")
    speeds.forget()
    yield tmp_path
    monkeypatch.undo()
    speeds.forget()


def chosen(operation, dtype=torch.float32, gradients=False):
    with torch.set_grad_enabled(gradients):
        return backends.choose_for(operation, "auto", CPU, dtype)


def test_a_fast_path_that_loses_to_torch_is_not_chosen(kernels):
    with speeds.using(figures(attention={"cpp": 0.4, "sdpa": 1.0}, delta_rule={"cpp": 3.0, "chunked": 1.0})):
        assert (chosen("attention"), chosen("delta_rule")) == ("sdpa", "cpp")
        assert chosen("attention", torch.bfloat16) == "cpp"  # no figure for it: the fixed order
        assert chosen("delta_rule", gradients=True) == "cpp"
    with speeds.using(figures(attention={"cpp": 2.0, "sdpa": 1.0})):
        assert chosen("attention") == "cpp"


def test_the_fastest_of_several_that_can_run(kernels, monkeypatch):
    table = figures(delta_rule={"cpp": 2.0, "chunked_recompute": 3.0, "chunked": 1.0})
    with speeds.using(table):
        assert chosen("delta_rule") == "chunked_recompute"
    table = figures(delta_rule={"cpp": 4.0, "chunked_recompute": 0.5, "chunked": 1.0})
    monkeypatch.setattr(availability, "missing", lambda: "no compiler")
    with speeds.using(table):
        assert chosen("delta_rule") == "chunked"


@pytest.mark.parametrize("faster", ["chunked", "recurrent"])
def test_what_runs_follows_the_figures(monkeypatch, faster):
    """Not only the name: the function of the other one is never called."""
    calls = []
    for name in ("chunked", "recurrent", "cpp", "chunked_recompute"):
        function = registry.function_of("delta_rule", name)

        def counted(*args, name=name, function=function, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setitem(registry._functions, ("delta_rule", name), counted)
    table = figures(delta_rule={"cpp": 1.0, "chunked_recompute": 1.0, "chunked": 1.0, "recurrent": 1.0, faster: 9.0})
    with speeds.using(table), torch.no_grad():
        small_model()(torch.arange(70)[None])
    assert calls == [faster] * 3


def test_close_figures_keep_the_fixed_order():
    names = ("a", "b", "c", "d")
    assert speeds.ranked(names, {"a": 1.0, "b": 1.05, "c": 1.3}) == ("c", "a", "b", "d")
    assert speeds.ranked(names, {}) == names
    assert speeds.ranked(names, {"b": 1.0, "c": 2.0}) == ("a", "c", "b", "d")  # nobody measured the others here


def test_the_mean_over_sizes_decides():
    ratios = {("linear", "float32", False): {"onednn": {16: 0.25, 2048: 8.0}, "torch": {16: 1.0, 2048: 1.0}}}
    with speeds.using(speeds.Figures("a test", ratios)):
        found = speeds.verdict("linear", torch.float32, False)
        assert found.speeds["onednn"] == pytest.approx(2**0.5)
        assert "onednn 1.4x, torch 1x (a test)" in str(found)


def test_the_first_table_that_has_figures_decides(kernels):
    here, shipped = (
        figures("here", attention={"cpp": 0.5, "sdpa": 1.0}),
        figures("kind", experts={"cpp": 0.5, "grouped": 1.0}),
    )
    with speeds.using(here, shipped):
        assert (chosen("attention"), chosen("experts")) == ("sdpa", "grouped")
        assert speeds.verdict("attention", torch.float32, False).source == "here"
        assert speeds.verdict("experts", torch.float32, False).source == "kind"


def test_explain_says_which_figure_decided(kernels):
    model = small_model()
    with speeds.using(figures("measured here", attention={"cpp": 0.5, "sdpa": 1.0})):
        rows = {row.operation: row for row in q.explain(model)}
    assert rows["attention"].runs == "sdpa"
    assert "sdpa 1x, cpp 0.5x (measured here)" in rows["attention"].why
    assert "no figure" in rows["delta_rule"].why


def test_shipped_tables_are_whole():
    """Every kind in the file is a kind, and every name in it is an implementation."""
    tables = json.loads(speeds.SHIPPED.read_text())
    assert tables
    assert tables.keys() <= {*cpu.LEVELS, "other"}
    for kind in tables:
        for (operation, _, _), names in speeds.shipped(kind).ratios.items():
            assert names.keys() <= {i.name for i in backends.OPERATIONS[operation]}
            assert tuning.REPLACED[operation] in names
    assert speeds.shipped("a kind that nobody measured") is None


def test_no_file_is_read_for_a_choice(cache, monkeypatch):
    chosen("linear")
    monkeypatch.setattr(speeds, "_read_all", lambda: pytest.fail("read again"))
    for _ in range(3):
        chosen("linear")
        chosen("delta_rule", gradients=True)


def test_tune_writes_a_table_that_decides(cache, kernels, monkeypatch, capsys):
    """With clocks that make one implementation slow, whatever the machine."""
    monkeypatch.setattr(tuning, "REPLACED", {"attention": "sdpa"})
    monkeypatch.setattr(tuning, "SIZES", (32,))
    monkeypatch.setattr(tuning, "_seconds", lambda _work, name, _gradients: {"cpp": 2.0, "sdpa": 1.0}[name])
    monkeypatch.setattr(tuning, "candidates", lambda _o, _d, gradients: [] if gradients else ["cpp", "sdpa"])
    assert main(["tune", "--repetitions", "1"]) == 0
    out = capsys.readouterr().out
    assert "attention, float32:" in out
    assert "cpp 0.50x at 32" in out
    assert chosen("attention") == "sdpa"
    assert "measured here" in speeds.verdict("attention", torch.float32, False).source
    monkeypatch.setenv("QWEN3NEXT_TUNED", "0")
    speeds.forget()
    found = speeds.verdict("attention", torch.float32, False)
    assert found is None or "shipped" in found.source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"where": "x"}',
        '{"where": "x", "figures": {"linear": {"float32": {"forward": {"a": {"8": -1}}}}}}',
        "\x00",
    ],
)
def test_a_corrupt_file_is_ignored_with_a_sentence(cache, text):
    path = speeds.tuned_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"is ignored .*: run `qwen3next tune`, or delete it"):
        chosen("attention")


def test_figures_are_of_one_processor_and_release(monkeypatch):
    paths = {speeds.tuned_path()}
    for owner, name, value in (
        (cpu, "name", lambda: "another"),
        (cpu, "kind", lambda: "another kind"),
        (torch, "__version__", "9"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            paths.add(speeds.tuned_path())
    assert len(paths) == 4


def test_everything_that_is_tuned_runs_by_every_candidate(monkeypatch):
    """Each piece of work gives the same by all of them, and has gradients where they are wanted."""
    monkeypatch.setattr(tuning, "SIZES", (40,))
    for operation, make in tuning.WORK.items():
        torch.manual_seed(0)
        work = make(40, torch.float32)
        names = tuning.candidates(operation, torch.float32, bool(work.inputs))
        assert tuning.REPLACED[operation] in names
        with torch.set_grad_enabled(bool(work.inputs)):
            found = [work.run(name) for name in names]
        if operation != "decode":
            for y in found:
                torch.testing.assert_close(y, found[0], rtol=2e-4, atol=2e-4)
        if work.inputs:
            assert all(x is not None for x in torch.autograd.grad(found[0].sum(), work.inputs))


def test_products_handed_to_torch_are_as_exact():
    """What AMX machines may choose for the bf16 delta rule, forced here: values and gradients beside fp64's loop."""
    torch.manual_seed(0)
    shapes = ((1, 150, 2, 32), (1, 150, 2, 32), (1, 150, 4, 32), (1, 150, 4), (1, 150, 4))
    q_, k, v, g, b = (torch.randn(*shape) for shape in shapes)
    v = v.bfloat16()

    def results(dtype, backend="auto"):
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in (q_, k, v, g, b)]
        parts = l2_normalise(leaves[0], scale=32**-0.5), l2_normalise(leaves[1]), leaves[2]
        o, _ = gated_delta_rule(*parts, -0.1 * leaves[3].exp(), leaves[4].sigmoid(), backend=backend)
        return [o, *torch.autograd.grad(o.to(torch.float64).square().sum(), leaves)]

    def errors(found):
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]

    exact, ratios = results(torch.float64, "recurrent"), {}
    for gradients in (False, True):
        ratios["delta_rule", "bfloat16", gradients] = {
            "chunked_recompute": {64: 2.0},
            "chunked": {64: 1.0},
            "cpp": {64: 0.9},
        }
    with speeds.using(speeds.Figures("an AMX machine", ratios)):
        assert chosen("delta_rule", torch.bfloat16, True) == "chunked_recompute"
        by_torch = errors(results(None))
    assert max(by_torch) < 2e-2  # bf16 has 8 bits
    assert max(by_torch) < 3 * max(errors(results(None, "chunked")))


def test_a_compiled_model_chooses_too():
    """The figures are looked up while the graph is traced, in a process that has not read them yet."""
    program = (
        "import torch, qwen3next as q; model = q.Qwen3Next(q.presets.tiny(num_hidden_layers=1)).eval()\n"
        "with torch.no_grad():\n"
        "    ids = torch.arange(40)[None]\n"
        "    y = torch.compile(lambda x: model(x).logits, fullgraph=True, backend='eager')(ids)\n"
        "    print(torch.equal(y, model(ids).logits))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "True", told.stderr[-2000:]
