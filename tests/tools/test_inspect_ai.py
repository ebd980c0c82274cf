"""inspect-ai evaluates our model through the server's interface, and through its own provider for transformers."""

import pytest
import torch
from chatting import PLAIN, tokenizer, write_chat_files
from conftest import small_model

import qwen3next as q
from qwen3next.chat.template import ChatTemplate

inspect_ai = pytest.importorskip("inspect_ai")
pytest.importorskip("openai")
pytest.importorskip("transformers")

from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import GenerateConfig, get_model  # noqa: E402
from inspect_ai.scorer import match  # noqa: E402
from served import serving  # noqa: E402

import qwen3next.hf  # noqa: E402

QUESTIONS = ("Who?", "Where was it?", "When?", "Why then?")
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random checkpoint whose replies are printable text."""
    folder, coder = tmp_path_factory.mktemp("model"), tokenizer(ascii_only=True)
    small_model(vocab_size=coder.get_vocab_size(), mtp_num_hidden_layers=0).save_pretrained(folder)
    write_chat_files(folder, coder, PLAIN)
    return folder


def replies(folder):
    """What `q.generate` says to each question."""
    model, coder, template = q.load(folder), tokenizer(ascii_only=True), ChatTemplate.load(folder)
    for question in QUESTIONS:
        prompt = template.render([{"role": "user", "content": question}])
        ids = torch.tensor([coder.encode(prompt, add_special_tokens=False).ids])
        new = q.generate(model, ids, max_new_tokens=NEW)[0, ids.shape[1] :]
        yield coder.decode(new.tolist(), skip_special_tokens=True)


def evaluated(model, folder, tmp_path):
    """Every answer is that of `q.generate`; one of the four targets is another, and counts as wrong."""
    expected = list(replies(folder))
    targets = [*expected[:3], "something else"]
    samples = [Sample(question, target=target) for question, target in zip(QUESTIONS, targets, strict=True)]
    task = inspect_ai.Task(dataset=samples, scorer=match("exact"))
    (log,) = inspect_ai.eval(task, model=model, display="none", log_dir=str(tmp_path))
    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == expected
    assert log.results.scores[0].metrics["accuracy"].value == 0.75
    return log


def test_through_the_server(folder, tmp_path):
    """The provider for interfaces like OpenAI's, with counts of tokens and log-probabilities."""
    for address, _ in serving(q.load(folder), tokenizer(ascii_only=True), template=PLAIN):
        config = GenerateConfig(temperature=0, max_tokens=NEW, logprobs=True, top_logprobs=2)
        model = get_model("openai-api/qwen3next/tiny", base_url=f"{address}/v1", api_key="none", config=config)
        log = evaluated(model, folder, tmp_path)
    for sample in log.samples:
        assert sample.output.usage.output_tokens == NEW
        assert len(sample.output.choices[0].logprobs.content) == NEW


def test_through_transformers(folder, tmp_path):
    """The provider `hf`, whose Auto class gives our model after `import qwen3next.hf`."""
    config = GenerateConfig(max_tokens=NEW)
    options = {"model_path": str(folder), "tokenizer_path": str(folder), "do_sample": False, "device": "cpu"}
    model = get_model("hf/local", config=config, **options)
    assert isinstance(model.api.model, qwen3next.hf.Qwen3NextForCausalLM)
    evaluated(model, folder, tmp_path)
