"""A random walk over changes of a model between two steps; every compiled step is compared with the modules.

`make test` runs hundreds of operations, `make test-slow` a hundred thousand.
"""

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import small_model
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from layers.cpp import build
from layers.norm import RMSNorm
from qwen3next.decoding.plan import Plan

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"compiled code cannot run: {build.missing()}")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "layer_types": ("linear_attention", "full_attention"),
         "head_dim": 16, "moe_intermediate_size": 16, "mtp_num_hidden_layers": 1}  # fmt: skip
KINDS = {"sparse": SMALL, "dense": SMALL | {"num_experts": 0}}
# Bounds against an fp64 forward, for the rounding of sums in another order. In lower precision near ties of a router
# may change experts, so only dense models are compared. A stale weight changes logits by their own size.
BOUND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2}
WIDTHS = (torch.int64, torch.int32, torch.int16, torch.int8)
some = st.integers(0, 10**6)


class Adapter(nn.Module):
    """Like a PEFT adapter: `.weight` is that of the wrapped layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        like = base.weight
        self.a, self.b = (nn.Parameter(like.new_empty(n, 3).normal_()) for n in reversed(like.shape))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b.T / 10


class Sub(nn.Parameter):
    """A subclass of Parameter."""


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Doubled(RMSNorm):
    def forward(self, x, **options):
        return 2 * super().forward(x, **options)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


# Valid results of a hook: tensors that broadcast, of any dtype and memory layout.
PATCHES = {
    "nothing": lambda x: None,
    "the same": lambda x: x,
    "half": lambda x: x * 0.5,
    "mean over rows": lambda x: x.mean(0, keepdim=True),
    "mean over the last axis": lambda x: x.mean(-1, keepdim=True),
    "one zero": lambda x: x.new_zeros(()),
    "fp64": lambda x: x.double(),
    "fp16": lambda x: x.half(),
    "other strides": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every second": lambda x: torch.stack((x, x), dim=-1)[..., 0],
}


class Changes(RuleBasedStateMachine):
    """After any of these rules a step equals the modules."""

    kind = "sparse"

    @initialize(seed=some)
    def start(self, seed):
        self.model = small_model(seed % 5, dtype=torch.float64, **KINDS[self.kind])
        self.random = torch.Generator().manual_seed(seed)
        self.handles: list = []
        self.count = 1
        self.new_cache(0, "none")

    @rule(seed=some)
    def start_again(self, seed):
        """Undo replacements, patches and hooks; otherwise most steps would run the modules."""
        self.start(seed)

    @rule(seed=some)
    def start_once_more(self, seed):
        self.start(seed)

    @rule(seed=some)
    def and_again(self, seed):
        self.start(seed)

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def pick(self, things, n):
        things = list(things)
        return things[n % len(things)]

    def weight(self, n):
        """A module that decoding uses, the name of one of its parameters, and the parameter."""
        parts = (self.model.embed_tokens, self.model.blocks, self.model.norm, self.model.lm_head)
        owners = [
            (m, name) for part in parts for m in part.modules() for name, p in m._parameters.items() if p is not None
        ]
        module, name = self.pick(owners, n)
        return module, name, module._parameters[name]

    # Steps

    @rule(n=st.integers(1, 3), width=st.sampled_from(WIDTHS), way=st.sampled_from(["plain", "strided", "expanded"]))
    def step(self, n, width, way):
        if max(self.cache.lengths) + n > self.cache.max_len:
            self.new_cache(0, "none")
        rows = self.cache.batch
        ids = torch.randint(0, 97, (rows, n), generator=self.random).to(width)
        ids = {"plain": ids, "strided": ids.mT.contiguous().mT, "expanded": ids[:1].expand(rows, n)}[way]
        (other,) = self.cache.fork()
        with torch.no_grad():
            want = self.model(ids, cache=other, logits_to_keep=1).logits[:, -1]
        torch.set_num_threads(self.count)
        got = self.model.step(ids, self.cache)
        torch.set_num_threads(1)
        self.count = 1
        self.compare(got, want)
        self.compare(self.model.logits_after(self.cache), want)

    @invariant()
    def agrees(self):
        if hasattr(self, "cache"):
            self.step(1, torch.int64, "plain")

    def compare(self, got, want):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert got.isfinite().all() == want.isfinite().all()
        if (self.dtype == torch.float64 or self.kind == "dense") and want.isfinite().all():
            apart, size = (got - want).double().norm(), want.double().norm()
            assert apart <= BOUND[self.dtype] * max(float(size), 1.0), f"{apart / size:.2g} of the logits' size"

    @rule(n=st.integers(1, 2))
    def step_in_another_thread(self, n):
        failed = []

        def run():
            try:
                self.step(n, torch.int64, "plain")
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    @rule(n=st.sampled_from([2, 3]))
    def threads(self, n):
        self.count = n  # only in the next step: with other busy processes, each further one costs milliseconds

    # Caches

    @rule(rows=st.integers(0, 2), kind=st.sampled_from(["none", "int8", "bf16 keys", "bf16 state", "history", "mtp"]))
    def new_cache(self, rows, kind):
        # Rounding of states amplifies differences in the last bits, so both routes are compared with exact states.
        if kind in ("int8", "bf16 keys", "bf16 state"):
            return
        options = {"history": {"history": 4}, "mtp": {"mtp": True}}.get(kind, {})
        self.cache = self.model.new_cache(rows + 1, max_len=60, **options)

    @rule(inside=st.booleans())
    def prefill(self, inside):
        self.new_cache(1, "none")
        with torch.inference_mode() if inside else torch.no_grad():
            list(self.model.prefill(torch.randint(0, 97, (2, 5), generator=self.random), self.cache))

    @rule()
    def fork(self):
        self.cache = self.cache.fork(2)[1]

    @rule(n=some)
    def select(self, n):
        self.cache = self.cache.select([n % self.cache.batch, 0])

    # Weights

    @rule(n=some, how=st.sampled_from(["in place", "data", "new object", "transposed", "view", "slice back", "swap"]))
    def change_weight(self, n, how):
        module, name, weight = self.weight(n)
        with torch.no_grad():
            if how == "in place":
                weight.mul_(1.1)
            elif how == "data":
                weight.data = weight.data * 0.9
            elif how == "new object":
                setattr(module, name, nn.Parameter(weight * 1.05))
            elif how == "transposed":
                weight.data = (weight.data * 0.95).mT.contiguous().mT if weight.ndim > 1 else weight.data * 0.95
            elif how == "view" and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
                weight.data = weight.data.T  # the same memory with other strides
            elif how == "slice back":
                weight.data = torch.cat((weight.data, weight.data))[: len(weight)]
            elif how == "swap":
                torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.05))

    @precondition(lambda self: type(self.model.lm_head) is not Adapter)
    @rule()
    def another_head(self):
        self.model.lm_head.weight = nn.Parameter(self.model.embed_tokens.weight.detach().clone())

    @rule(n=some)
    def subclass(self, n):
        module, name, weight = self.weight(n)
        setattr(module, name, Sub(weight.detach() * 1.01))

    @rule(factor=st.sampled_from([0.98, 1.02]))
    def assign(self, factor):
        state = {name: x * factor if x.is_floating_point() else x for name, x in self.model.state_dict().items()}
        with contextlib.suppress(RuntimeError):  # adapters have other names
            self.model.load_state_dict(state, assign=True)

    @rule(dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    def cast(self, dtype):
        self.model.to(dtype)
        self.new_cache(1, "none")

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def cast_in_the_middle(self, dtype):
        if dtype != self.dtype:
            self.model.to(dtype)
            if not any(isinstance(m, Adapter) for m in self.model.modules()):
                self.step(1, torch.int64, "plain")
            self.new_cache(1, "none")

    # Replaced modules

    @rule(n=some)
    def adapter(self, n):
        linears = [(m, k) for m in self.model.modules() for k, c in m._modules.items() if isinstance(c, nn.Linear)]
        linears = [(m, k) for m, k in linears if not isinstance(m, Adapter) and k != "router"]
        module, name = self.pick(linears, n)
        setattr(module, name, Adapter(getattr(module, name)))

    @rule()
    def merge(self):
        for module in list(self.model.modules()):
            for name, child in list(module._modules.items()):
                if isinstance(child, Adapter):
                    with torch.no_grad():
                        child.base.weight.add_((child.a @ child.b.T).T / 10)
                    setattr(module, name, child.base)

    @rule(n=some)
    def parametrize_and_back(self, n):
        module, name, _ = self.weight(n)
        if parametrize.is_parametrized(module) or type(module) is Adapter:
            return
        parametrize.register_parametrization(module, name, Twice(), unsafe=True)
        self.step(1, torch.int64, "plain")
        parametrize.remove_parametrizations(module, name)

    @rule(what=st.sampled_from(["embedding", "scaled", "norm", "doubled", "head", "biased", "long head"]))
    def replace(self, what):
        model, width = self.model, SMALL["hidden_size"]
        new = {
            "embedding": lambda: nn.Embedding(97, width),
            "scaled": lambda: Scaled(97, width),
            "norm": lambda: RMSNorm(width),
            "doubled": lambda: Doubled(width),
            "head": lambda: nn.Linear(width, 97, bias=False),
            "biased": lambda: nn.Linear(width, 97),
            "long head": lambda: nn.Linear(width, 101, bias=False),
        }[what]().to(self.dtype)
        name = {"e": "embed_tokens", "s": "embed_tokens", "n": "norm", "d": "norm"}.get(what[0], "lm_head")
        setattr(model, name, new)
        self.new_cache(1, "none")  # its saved logits have another size

    @rule(n=some, what=st.sampled_from(["eps", "top_k", "norm_topk_prob", "max_norm", "zero_centred"]))
    def setting(self, n, what):
        owners = [m for part in (self.model.embed_tokens, self.model.blocks, self.model.norm) for m in part.modules()]
        owners = [m for m in owners if hasattr(m, what)]
        if owners:
            value = {"eps": 10.0 ** -(n % 7), "top_k": 1 + n % 4, "max_norm": 0.5 + n % 3}.get(what, bool(n % 2))
            setattr(self.pick(owners, n), what, value)

    @rule(theta=st.sampled_from([100.0, 1e4]))
    def rope(self, theta):
        self.model.config = self.model.config.replace(rope_theta=theta)
        self.new_cache(0, "none")

    @rule(n=some)
    def forward_of_its_own(self, n):
        module = self.pick(self.model.blocks.modules(), n)
        real = module.forward
        module.forward = lambda *args, **options: real(*args, **options)

    @rule(n=some)
    def forward_of_a_class(self, n):
        kind = type(self.pick([m for m in self.model.blocks.modules() if isinstance(m, nn.Linear)], n))
        real = kind.forward
        kind.forward = lambda module, x: 1.5 * real(module, x)
        try:
            self.step(1, torch.int64, "plain")
        finally:
            kind.forward = real

    # Hooks

    @rule(n=some, patch=st.sampled_from(sorted(PATCHES)))
    def hook_point(self, n, patch):
        points = [
            p for name, p in self.model.hook_dict.items() if p.dtype != "int64" and not p.route and "mtp" not in name
        ]
        point = self.pick([p for p in points if not p.active], n)
        if patch == "fp16" and self.dtype == torch.float64:
            return  # its rounding may change a router's choice
        self.handles.append(point.register_forward_hook(lambda module, args, x: PATCHES[patch](x)))

    @rule(n=some)
    def module_hook(self, n):
        module = self.pick([m for m in self.model.blocks.modules() if isinstance(m, nn.Linear)], n)
        if n % 2:
            self.handles.append(module.register_forward_hook(lambda module, args, x: x * 0.9))
        else:
            self.handles.append(module.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,)))

    @rule(n=some)
    def hook_at_the_ends(self, n):
        module = self.pick((self.model.embed_tokens, self.model.norm, self.model.lm_head), n)
        self.handles.append(module.register_forward_hook(lambda module, args, x: x * 0.9))

    @rule()
    def hook_of_all(self):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(1))
        try:
            self.model.step(torch.zeros(self.cache.batch, 1, dtype=torch.long), self.model.new_cache(self.cache.batch))
        finally:
            handle.remove()
        assert seen

    @rule()
    def counted(self):
        with FlopCounterMode(display=False) as counter:
            self.model.step(torch.zeros(1, 1, dtype=torch.long), self.model.new_cache(1))
        assert counter.get_total_flops() > 0

    @precondition(lambda self: self.handles)
    @rule(n=some)
    def remove_hook(self, n):
        self.handles.pop(n % len(self.handles)).remove()

    @rule()
    def remove_all(self):
        while self.handles:
            self.handles.pop().remove()

    # Backends

    @rule(n=some)
    def backend(self, n):
        choices = [("linear", "torch"), ("elementwise", "torch"), ("delta_rule", "recurrent"),
                   ("delta_rule", "chunked"), ("attention", "eager"), ("attention", "sdpa"),
                   ("decode", "torch")]  # fmt: skip
        choices += [(operation, "auto") for operation, _ in choices] * 2
        self.model.set_backend(*self.pick(choices, n))

    @rule(n=some)
    def backend_of_one(self, n):
        module = self.pick([m for m in self.model.modules() if isinstance(m, (RMSNorm, nn.Linear))], n)
        module.backend = "torch" if n % 2 else "auto"


def walk(kind, operations, length):
    machine = type(kind.title(), (Changes,), {"kind": kind})
    threads = torch.get_num_threads()
    options = settings(
        max_examples=operations // length,
        stateful_step_count=length,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate,),  # the operations up to a failure are printed; shrinking them takes minutes
        suppress_health_check=list(HealthCheck),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_state_machine_as_test(machine, settings=options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_follows_every_change(kind):
    walk(kind, operations=400, length=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_follows_many_changes(kind):
    """In a separate process without the shape checks, which make a step twenty times slower."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "JAXTYPING_DISABLE": "1"}
    command = [sys.executable, __file__, kind, "50000", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


if __name__ == "__main__":
    ran, run = [], Plan.run
    Plan.run = lambda *args: (ran.append(1), run(*args))[1]
    walk(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(f"{len(ran)} compiled steps in {sys.argv[2]} operations")
    assert len(ran) > int(sys.argv[2]) / 4
