"""Helpers of the chat tests: templates like released ones, tokenizers, a model with scripted replies."""

import json
from pathlib import Path

import torch
from conftest import small_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import qwen3next as q
from qwen3next.cache.hybrid import HybridCache

PLAIN = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

# Uses JSON schemas, function calls and results, loop controls, namespaces, and the generation tag.
TOOLS = """\
{%- set ns = namespace(turns=0, date=strftime_now("%Y")) %}
{%- if messages[0].role != "system" and not tools %}{{ raise_exception("Begin with a system message <&>.") }}{% endif %}
{%- if tools %}
<|im_start|>system
{{ messages[0].content if messages[0].role == "system" else "Functions, as of " ~ ns.date ~ ":" }}
    {%- for tool in tools %}

{{ tool | tojson }}
    {%- endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if ns.turns > 5 %}{% break %}{% endif %}
    {%- if message.role == "assistant" %}
<|im_start|>assistant
{% generation %}{{ message.content or "" }}
        {%- for call in message.tool_calls or [] %}

<tool_call>{{ call.function | tojson(indent=1) }}</tool_call>
        {%- endfor %}<|im_end|>{% endgeneration %}

    {%- else %}
<|im_start|>{{ "user" if message.role == "tool" else message.role }}
{{ "<tool_response>" ~ message.content ~ "</tool_response>" if message.role == "tool" else message.content }}<|im_end|>
    {%- endif %}
{% endfor %}
{{- "<|im_start|>assistant\\n" if add_generation_prompt }}{{ bos_token }}{{ eos_token | upper }}"""

# Opens thinking unless disabled, and omits the thinking of earlier turns.
THINKING = """\
{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content | default("") %}
        {%- if not reasoning and "</think>" in content %}
            {%- set reasoning = content.split("</think>")[0].split("<think>")[-1] %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {%- if loop.index0 > last.user %}
            {{- "<think>\\n" + reasoning.strip("\\n") + "\\n</think>\\n\\n" }}
        {%- endif %}
    {%- endif %}
    {{- content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}"""

# The generation prompt itself opens the thinking.
PREFILLED = PLAIN.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")

TEMPLATES = {"plain": PLAIN, "tools": TOOLS, "thinking": THINKING, "prefilled": PREFILLED}


def tokenizer(*, ascii_only: bool = False, special_tags: bool = False) -> Tokenizer:
    """Tokens are bytes, or only printable ASCII (so that every reply of a random model is text), and chat markup."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if ascii_only:
        letters = [x for x in letters if "!" <= x <= "~" or x in "ĠĊ"]  # byte-level names of space and newline
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken(tag, special=special_tags, normalized=False) for tag in ("<think>", "</think>")])
    return made


class Scripted(q.Qwen3Next):
    """Runs the model with its cache, then replaces the logits so that each reply is the next of its lines.

    `lines` are token ids. A forward of more than one token belongs to a prompt, which starts the next reply.
    """

    lines: list[list[int]]
    at = 0

    def forward(self, input_ids, segments=None, cache: HybridCache | None = None, logits_to_keep: int = 0) -> q.Output:
        out = super().forward(input_ids, segments, cache, logits_to_keep)
        if input_ids.shape[1] > 1:
            self.line = self.line if self.at == 1 else self.lines.pop(0)
            self.at = 0
        out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(self.line[self.at]), self.vocab_size) * 1e3
        self.at += 1
        return out


def scripted(coder: Tokenizer, *replies: str, **changes: object) -> Scripted:
    """A model with these replies, which contain "<|im_end|>" if they should end."""
    made = small_model(vocab_size=coder.get_vocab_size(), **changes)
    made.__class__ = Scripted
    assert isinstance(made, Scripted)
    made.lines = [coder.encode(text).ids for text in replies]
    return made


def write_chat_files(folder: Path, coder: Tokenizer, template: str, **generation: object) -> None:
    """Writes the tokenizer and template files of a chat checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    coder.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
