"""Match filters against hook points, by this project's names and by TransformerLens' names."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Filter = str | Sequence[str] | Callable[[str], bool]

# TransformerLens' name below a block → ours; `attn` is the block's token mixer of either kind.
IN_A_SOFTMAX_BLOCK = {
    "attn.hook_q": "self_attn.hook_q_pre",  # TransformerLens' q and k are outputs of the projections, before norms
    "attn.hook_k": "self_attn.hook_k_pre",
    "attn.hook_v": "self_attn.hook_v",
    "attn.hook_rot_q": "self_attn.hook_rot_q",
    "attn.hook_rot_k": "self_attn.hook_rot_k",
    "attn.hook_attn_scores": "self_attn.hook_scores",
    "attn.hook_pattern": "self_attn.hook_pattern",
    "attn.hook_z": "self_attn.hook_gated",  # the input of the output projection, so gated
}
IN_A_GDN_BLOCK = {
    "attn.hook_q": "linear_attn.hook_q",
    "attn.hook_k": "linear_attn.hook_k",
    "attn.hook_v": "linear_attn.hook_v",
    "attn.hook_pattern": "linear_attn.hook_pattern",
    "attn.hook_z": "linear_attn.hook_gated",
    "linear_attn.hook_q_pre_conv": "linear_attn.hook_q_pre",
    "linear_attn.hook_k_pre_conv": "linear_attn.hook_k_pre",
    "linear_attn.hook_v_pre_conv": "linear_attn.hook_v_pre",
    "linear_attn.hook_recurrence_out": "linear_attn.hook_o",
    "linear_attn.hook_gate_input": "linear_attn.hook_gate_logit",
    "linear_attn.hook_ssm_state": "linear_attn.hook_state",
}
IN_EVERY_BLOCK = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
    "mlp.hook_expert_weights": "mlp.hook_router_weights",
    "mlp.hook_expert_indices": "mlp.hook_router_indices",
}
OUTSIDE = {
    "embed.hook_out": "hook_embed",
    "ln_final.hook_normalized": "hook_final_normalized",
    "ln_final.hook_out": "hook_final_norm",
    "unembed.hook_out": "hook_logits",
    "hook_unembed": "hook_logits",
}


def aliases(known: Iterable[str]) -> dict[str, str]:
    """TransformerLens' names → ours, for the points that the model has."""
    known = set(known)
    found = {theirs: ours for theirs, ours in OUTSIDE.items() if ours in known}
    for block in sorted({match[0] for name in known if (match := re.match(r"(mtp\.)?blocks\.\d+\.", name))}):
        for table in (IN_A_SOFTMAX_BLOCK, IN_A_GDN_BLOCK, IN_EVERY_BLOCK):
            found |= {block + theirs: block + ours for theirs, ours in table.items() if block + ours in known}
    old = {name.replace("hook_recalled", "hook_erased"): name for name in known if name.endswith("hook_recalled")}
    return found | old  # hook_erased is the name of hook_recalled before release 0.2


@dataclass(frozen=True)
class Chosen:
    """The points that one filter matched, and which of them must fire.

    Attributes:
        names: this project's names, in the order of the model.
        awaited: the points that should fire.
        each: whether all awaited points must fire; else one is enough.
    """

    names: tuple[str, ...]
    awaited: frozenset[str]
    each: bool

    def silent(self, heard: set[str]) -> set[str]:
        """Points that should have fired and did not, given the names that fired."""
        return set(self.awaited - heard) if self.each or not self.awaited & heard else set()


def choose(names: Filter, known: Sequence[str], alias: Mapping[str, str]) -> list[Chosen]:
    """One `Chosen` per glob, or one for a predicate; this project's names take precedence over TransformerLens'.

    Of a glob that ends in a wildcard, one match must fire; of any other glob, every match. Forward does not run the MTP
    head, so its points must fire only if the filter matches nothing else.
    Raises: ValueError if nothing matches.
    """
    if callable(names):
        theirs = {ours for name, ours in alias.items() if names(name)}
        found = {"the predicate": {name for name in known if names(name)} or theirs}
    else:
        patterns = [names] if isinstance(names, str) else names
        found = {p: set(fnmatch.filter(known, p)) or {alias[a] for a in fnmatch.filter(alias, p)} for p in patterns}
    unmatched = [pattern for pattern, matches in found.items() if not matches]
    if unmatched:
        raise ValueError(f"No hook point matches {', '.join(unmatched)}: model.hook_dict lists them all.")
    result = []
    for pattern, matches in found.items():
        ordered = tuple(name for name in known if name in matches)
        main = frozenset(name for name in ordered if not name.startswith("mtp."))
        result.append(Chosen(ordered, main or frozenset(ordered), each=pattern[-1] not in "*?]"))
    return result
