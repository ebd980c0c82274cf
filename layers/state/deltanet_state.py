"""What a Gated DeltaNet layer carries from one call to the next, and how a call extends it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.delta_rule import Rule
from layers.deprecation import renamed_attribute
from layers.segments import Segments
from layers.state.update_log import UpdateLog


@dataclass
class DeltaNetState:
    """What the layer carries from one call to the next; its size does not depend on the context's length.

    Attributes:
        conv: (b, kernel_size − 1, channels) last inputs of the convolution, in the model's dtype.
        recurrent: (b, h, k, v) the recurrent state, fp32 unless a cache was made with less.
        update_log: where the next call logs its updates; None if they are not logged or hooks make the log incomplete.
        cut: columns of that call before the first that is logged; the update_log then begins anew there.
    """

    conv: Tensor
    recurrent: Tensor
    update_log: UpdateLog | None = None
    cut: int = 0

    memory = renamed_attribute("memory", "recurrent")
    tape = renamed_attribute("tape", "update_log")

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.recurrent.nbytes

    def share(self) -> "DeltaNetState":
        """Another state of the same values; each of the two goes on by itself."""
        return DeltaNetState(self.conv, self.recurrent)

    def replace(self, conv: Tensor, recurrent: Tensor) -> None:
        """Take the place of what came before; the recurrent state keeps its dtype."""
        self.conv, self.recurrent = conv.detach(), recurrent.detach().to(self.recurrent.dtype)

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
        """Run `rule` from this state, and log the last tokens' updates if there is an update log: then none is padding.

        Args:
            inputs: (b t channels) of the convolution.
            hooked: whether hooks inside the rule may change the state, which then does not follow from a log.
            corrects: whether the rule writes what is new in v (the delta rule), or else all of it.
        Returns: output and the recurrent state after it, which `replace` takes.
        """
        parts = [q, k, v, log_decay, beta]
        if hooked:
            self.update_log = None
        if self.update_log is None:
            return rule(*parts, state=self.recurrent, segments=segments)
        before, outputs = self.recurrent, []
        if self.cut:
            o, before = rule(*(x[:, : self.cut] for x in parts), state=before)
            self.update_log = UpdateLog(self._conv_after(inputs[:, : self.cut]), before.detach(), self.recurrent.dtype)
            outputs.append(o)
            inputs, *parts = (x[:, self.cut :] for x in (inputs, *parts))
        o, recurrent = rule(*parts, state=before)
        inputs, _, k, v, log_decay, beta = (x.detach() for x in (inputs, *parts))
        self.update_log.add(inputs, k, v, log_decay, beta, before.detach(), corrects=corrects)
        return torch.cat([*outputs, o], dim=1) if outputs else o, recurrent

    def _conv_after(self, inputs: Tensor) -> Tensor:
        """The last inputs of the convolution after these."""
        kernel_size = self.conv.shape[1]
        recent = inputs[:, max(inputs.shape[1] - kernel_size, 0) :]
        return torch.cat((self.conv.to(inputs.dtype), recent), dim=1)[:, -kernel_size:].detach().clone()
