"""What a Gated DeltaNet layer carries from one call to the next, and how a call extends it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.delta_rule import Rule
from layers.segments import Segments
from layers.state.update_log import Tape


@dataclass
class DeltaNetState:
    """What the layer carries from one call to the next; its size does not depend on the context's length.

    Attributes:
        conv: (b, taps − 1, channels) last inputs of the convolution, in the model's dtype.
        memory: (b, h, k, v) the recurrent state, fp32 unless a cache was made with less.
        tape: where the next call logs its updates; None if updates are not logged, or if hooks make the log incomplete.
        cut: columns of that call before the first that is logged; the tape then begins anew there.
    """

    conv: Tensor
    memory: Tensor
    tape: Tape | None = None
    cut: int = 0

    def replace(self, conv: Tensor, memory: Tensor) -> None:
        """Take the place of what came before; the recurrent state keeps its dtype."""
        self.conv, self.memory = conv.detach(), memory.detach().to(self.memory.dtype)

    def extend(
        self,
        rule: Rule,
        inputs: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        *,
        segments: Segments | None,
        hooked: bool,
        corrects: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run `rule` from this state, and log the last tokens' updates where there is a tape: then none is padding.

        Args:
            inputs: (b t channels) of the convolution.
            hooked: whether hooks inside the rule may change the state, which then does not follow from a log.
            corrects: whether the rule writes what is new in v (the delta rule), or else all of it.
        Returns: output and the recurrent state after it, which `replace` takes.
        """
        parts = [q, k, v, log_decay, beta]
        if hooked:
            self.tape = None
        if self.tape is None:
            return rule(*parts, state=self.memory, segments=segments)
        before, outputs = self.memory, []
        if self.cut:
            o, before = rule(*(x[:, : self.cut] for x in parts), state=before)
            self.tape = Tape(self._conv_after(inputs[:, : self.cut]), before.detach(), self.memory.dtype)
            outputs.append(o)
            inputs, *parts = (x[:, self.cut :] for x in (inputs, *parts))
        o, memory = rule(*parts, state=before)
        inputs, _, k, v, log_decay, beta = (x.detach() for x in (inputs, *parts))
        self.tape.add(inputs, k, v, log_decay, beta, before.detach(), corrects=corrects)
        return torch.cat([*outputs, o], dim=1) if outputs else o, memory

    def _conv_after(self, inputs: Tensor) -> Tensor:
        """The last inputs of the convolution after these."""
        taps = self.conv.shape[1]
        recent = inputs[:, max(inputs.shape[1] - taps, 0) :]
        return torch.cat((self.conv.to(inputs.dtype), recent), dim=1)[:, -taps:].detach().clone()
