"""The interface held to published descriptions of OpenAI's, and random requests held to our own description.

`make test-server` runs these in an environment of its own; elsewhere they are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import GivenReplies, Server, byte_tokenizer, running

from qwen3next.chat.template import ChatTemplate

TEMPLATE = "{% if tools %}TOOLS{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}bot:"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "San Francisco"}}\n</tool_call>'
BIN = Path(sys.executable).parent
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "response_headers_conformance", "unsupported_method"),
)
EXAMPLES = int(os.environ.get("QWEN3NEXT_EXAMPLES", "60"))  # random requests for each route


def reply(prompt):
    return CALL if "TOOLS" in prompt and "tool:" not in prompt else "One, two, three."


@pytest.fixture(scope="module")
def address():
    tokenizer = byte_tokenizer(markup=True)
    server = Server(GivenReplies(tokenizer, reply=reply), tokenizer, name="tiny", template=ChatTemplate(TEMPLATE))
    with running(server) as found:
        yield found


def wanted(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")


@wanted("llm_comply")
@pytest.mark.parametrize("form", ["openai-chat", "open-responses"])
def test_answers_fit_the_published_schemas(address, form):
    """All that a text model can do; pictures are refused, and no summary of the thinking is made."""
    command = [BIN / "llm-comply", "-u", f"{address}/v1", "-k", "x", "-m", "tiny", "--format", form, "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    results = json.loads(found.stdout)
    failed = {one["id"]: one for one in results["results"] if one["status"] not in ("passed", "skipped")}
    assert set(failed) <= {"chat-image-input", "image-input"}, json.dumps(failed, indent=1)[:3000]
    assert len(results["results"]) >= 9


@wanted("schemathesis")
def test_random_requests_fit_the_description(address, tmp_path):
    """What the description allows is answered or refused with an error of the right shape; no request breaks it."""
    command = [
        *(BIN / "schemathesis", "run", f"{address}/openapi.json", "--seed", "1", "--max-examples", str(EXAMPLES)),
        *(
            "--checks",
            ",".join(CHECKS),
        ),
        *("--phases", "examples,coverage,fuzzing", "--mode", "all", "--workers", "1"),
        *("--header", "Authorization: Bearer x"),
    ]
    environment = os.environ | {"NO_COLOR": "1", "SCHEMATHESIS_HOOKS": ""}
    options = {"env": environment, "cwd": tmp_path}  # it keeps what it found in the folder where it runs
    found = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
