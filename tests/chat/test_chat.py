"""Conversations: replies and history, reuse of the cache without any change of the replies, interrupts, limits."""

from collections import defaultdict

import pytest
import torch
from chatting import PLAIN, PREFILLED, TEMPLATES, THINKING, scripted, tokenizer
from conftest import small_model

import qwen3next as q
from qwen3next.chat import ChatTemplate, Conversation, GenerationConfig

TOKENS = {"eos_token": "<|im_end|>"}


def talk(model, coder, template=PLAIN, **options):
    return Conversation(model, coder, ChatTemplate(template, special_tokens=TOKENS), **options)


def say(conversation, text, **options):
    """The reply's thinking and answer."""
    said = defaultdict(str)
    for kind, piece in conversation.reply(text, **options):
        said[kind] += piece
    return said["thinking"], said["answer"]


@pytest.mark.parametrize("special_tags", [False, True])
@pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "spelled"])
def test_a_reply_that_thinks(special_tags, spelled):
    """Tags are ordinary or control tokens, or spelled with several tokens; markup is never shown."""
    coder = tokenizer(special_tags=special_tags)
    text = "<think>\n1 and 1 é\n</think>\n\nTwo <b>🎉</b>"
    model = scripted(coder, text + "<|im_start|><|im_end|>" * (not spelled))
    if spelled:
        plain = tokenizer()
        plain = type(plain).from_str(plain.to_str().replace("think>", "other>").replace("<|im_", "<|xx_"))
        model.lines = [plain.encode(text + "<|im_end|>").ids]
    chat = talk(model, coder, THINKING)
    assert say(chat, "1 + 1?") == ("1 and 1 é", "Two <b>🎉</b>")
    assert chat.messages == [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Two <b>🎉</b>", "reasoning_content": "1 and 1 é"},
    ]
    assert chat.stats.ended == "stop"


def test_thinking_that_the_prompt_opened():
    coder = tokenizer()
    chat = talk(scripted(coder, "\nhm\n</think>\n\nyes<|im_end|>"), coder, PREFILLED)
    assert say(chat, "<think>") == ("hm", "yes")


def test_thinking_that_the_prompt_closed():
    coder = tokenizer()
    chat = talk(scripted(coder, "yes<|im_end|>"), coder, THINKING, variables={"enable_thinking": False})
    assert say(chat, "x") == ("", "yes")
    assert "reasoning_content" not in chat.messages[-1]


@pytest.fixture(scope="module")
def ascii64():
    """A model in fp64 whose tokens are characters, so that its text has a unique tokenisation and no markup."""
    coder = tokenizer(ascii_only=True)
    model = small_model(vocab_size=coder.get_vocab_size(), dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[-4:] = 0
    return coder, model


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_cache_changes_nothing(ascii64, template):
    """Each turn's reply equals that of `generate` on the whole prompt without a cache."""
    coder, model = ascii64
    chat = talk(model, coder, template, system="Be brief.")
    for turn, text in enumerate(["Hello, you", "and?", "Once more"]):
        asked = [*chat.messages, {"role": "user", "content": text}]
        said = say(chat, text, max_new_tokens=12)
        ids = coder.encode(chat.template.render(asked)).ids
        cold = coder.decode(q.generate(model, torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :].tolist())
        assert said == ((cold, "") if template == PREFILLED else ("", cold))
        assert chat.stats.prompt == len(ids)
        if template == PLAIN:
            assert (chat.stats.reused > 0) == (turn > 0)
        elif template == PREFILLED:
            assert chat.stats.reused < len(ids)  # the thinking that the prompt opened is not in the next prompt


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_was_there_before_is_never_run_again(ascii64, template, thinking):
    """A template may open or close thinking after the prompt and omit it from the next prompt: each turn continues from
    the first difference, or from the last state that does not depend on it."""
    coder, model = ascii64
    chat = talk(model, coder, template, system="s", variables={"enable_thinking": thinking})
    for turn in range(4):
        known = chat.template.render(chat.messages, variables=chat.variables, add_generation_prompt=False)
        say(chat, f"question {turn}", max_new_tokens=100 if turn == 1 else 9, seed=1, temperature=1.0)
        if turn:
            assert chat.stats.reused >= len(coder.encode(known[: known.rfind("<|im_start|>assistant\n") + 22]).ids)


def test_stop_strings_and_rules_of_the_configuration(ascii64):
    coder, model = ascii64
    said = say(talk(model, coder), "Hello", max_new_tokens=20)[1]
    stop, banned = said[3:5], coder.token_to_id(said[0])
    config = GenerationConfig(stop_strings=(stop,), max_new_tokens=4)
    chat = talk(model, coder, generation=config)
    assert say(chat, "Hello", max_new_tokens=20)[1] == said[: said.index(stop)]
    assert chat.stats.ended == "stop"
    assert say(talk(model, coder, generation=config), "Hello")[1] == said[:4]
    assert chat.generation.max_new_tokens == 4
    rules = q.SamplingRules(suppress_tokens=(banned,))
    assert (
        said[0] not in say(talk(model, coder, generation=GenerationConfig(rules=rules)), "Hello", max_new_tokens=20)[1]
    )


def test_the_cache_is_continued_by_all_it_holds(ascii64):
    coder, model = ascii64
    chat = talk(model, coder)
    say(chat, "Hello", max_new_tokens=9)
    held = chat.stats.prompt + 8  # the last token has not been run
    say(chat, "and", max_new_tokens=9)
    assert chat.stats.reused == held
    asked = chat.template.render([*chat.messages[:-2], {"role": "user", "content": ""}], add_generation_prompt=False)
    chat.undo()
    said = say(chat, "or", max_new_tokens=9)
    assert chat.stats.reused == len(coder.encode(asked.removesuffix("<|im_end|>\n")).ids)  # up to the changed question
    fresh = talk(model, coder)
    fresh.messages = chat.messages[:-2]
    assert say(fresh, "or", max_new_tokens=9) == said


def test_an_interrupted_reply_keeps_what_was_said(ascii64):
    coder, model = ascii64
    chat = talk(model, coder)
    reply = chat.reply("Hello", max_new_tokens=50)
    said = "".join(next(reply)[1] for _ in range(5))
    assert chat.messages == []  # added to the history at the end of the reply
    reply.close()
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    assert chat.stats.ended == "interrupted"
    fresh = talk(model, coder)
    fresh.messages = chat.messages
    assert say(chat, "go on", max_new_tokens=20) == say(fresh, "go on", max_new_tokens=20)
    assert (chat.stats.reused > 0, fresh.stats.reused) == (True, 0)


@pytest.mark.parametrize("when", [1, 2, 7], ids=["prompt", "second token", "middle"])
def test_ctrl_c_within_a_forward(ascii64, when):
    """The failure is between two layers, so the cache must not be used again."""
    coder, model = ascii64
    chat, calls = talk(model, coder), []
    kept = say(chat, "Hello", max_new_tokens=5)

    def interrupt(*_):
        calls.append(0)
        if len(calls) == when:
            raise KeyboardInterrupt

    hook = model.blocks[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "again", max_new_tokens=30)
    hook.remove()
    said = chat.messages[2:]
    assert chat.messages[:2] == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": kept[1]}]
    assert [len(m["content"]) for m in said] == ([] if when == 1 else [len("again"), when - 1])
    fresh = talk(model, coder)
    fresh.messages = chat.messages
    assert say(chat, "go on", max_new_tokens=20) == say(fresh, "go on", max_new_tokens=20)
    assert chat.stats.reused == 0


def test_what_ends_a_reply(ascii64):
    coder, model = ascii64
    config = GenerationConfig(stop_tokens=(coder.token_to_id("e"),))
    chat = talk(scripted(coder, "more", "m<|im_end|>ore", "more"), coder, generation=config)
    assert say(chat, "x")[1] == "mor"
    assert say(chat, "x")[1] == "m"  # the template's end token, although generation_config.json does not have it
    assert say(chat, "x", max_new_tokens=2)[1] == "mo"
    assert chat.stats.ended == "length"
    model = scripted(coder, "a", eos_token_id=[3, coder.token_to_id("a")])
    assert say(Conversation(model, coder, ChatTemplate(PLAIN)), "x") == ("", "")  # the end token of config.json


def test_sampling_comes_from_the_configuration_unless_it_is_given(ascii64):
    coder, model = ascii64
    config = GenerationConfig(temperature=1.5, top_k=40, top_p=0.95)

    def reply(generation=None, **options):
        return say(talk(model, coder, generation=generation), "Hello", max_new_tokens=20, **options)

    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.95}
    assert reply(config, seed=1) == reply(seed=1, **options) != reply(config, seed=2)
    assert reply(config, temperature=0.0) == reply()


def test_a_conversation_beyond_the_context(ascii64):
    coder, model = ascii64
    chat = talk(model, coder, max_context=40)
    say(chat, "Hi")
    assert chat.stats.ended == "length"
    assert chat.stats.prompt + chat.stats.new == 40
    before = chat.messages
    with pytest.raises(ValueError, match=r"has \d+ tokens, .* a context of 40: remove messages"):
        chat.reply("Hi")
    assert chat.messages is before
    assert talk(model, coder).max_context == model.config.max_position_embeddings
    with pytest.raises(ValueError, match="max_context must be at least 1"):
        talk(model, coder, max_context=0)


@pytest.mark.parametrize(
    "template, text, sentence",
    [
        ("{{ raise_exception('no') }}", "x", "refuses this conversation: no"),
        ("{# nothing #}", "x", "gives an empty prompt"),
        (PLAIN, [{"type": "image", "image": "x.png"}], "Message 1 has a part of type 'image'"),
    ],
)
def test_errors_come_before_anything_runs(ascii64, template, text, sentence):
    chat = talk(ascii64[1], ascii64[0], template)
    with pytest.raises(ValueError, match=sentence):
        chat.reply(text)
    assert chat.messages == []
    assert chat.stats is None


def test_a_reply_that_is_not_listened_to_changes_nothing(ascii64):
    chat = talk(ascii64[1], ascii64[0])
    chat.reply("x").close()
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        next(chat.reply("x", max_new_tokens=0))
    assert chat.messages == []


@pytest.mark.parametrize("draft_tokens", [2, "auto"])
def test_drafts_change_nothing(ascii64, draft_tokens):
    """Several turns, sampled; the second interrupted."""
    (coder, model), said = ascii64, []
    for drafts in (0, draft_tokens):
        chat = talk(model, coder, draft_tokens=drafts)
        replies = [list(chat.reply("hello there", max_new_tokens=20, temperature=0.9, seed=1))]
        broken = chat.reply("go on", max_new_tokens=20, temperature=0.9, seed=2)
        replies.append([next(broken)])
        broken.close()
        replies.append(list(chat.reply("and then", max_new_tokens=20, temperature=0.9, seed=3)))
        said.append(["".join(text for _, text in reply) for reply in replies])
    assert said[0] == said[1]
