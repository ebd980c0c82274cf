"""`qwen3next serve`: answer requests over HTTP."""

import ipaddress
import os
import sys
from pathlib import Path
from typing import Literal

from qwen3next.chat.template import ChatTemplate
from qwen3next.commands.common import LOADING, Folder, LoadingOptions, Quiet, Verbose, open_model, open_tokenizer
from qwen3next.files.sizes import parse_bytes


def serve(
    folder: Folder,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_memory: str = "2GiB",
    max_waiting: int = 64,
    max_rows: int = 16,
    prefix_memory: str = "1GiB",
    prefix_folder: Path | None = None,
    prefix_disk: str = "16GiB",
    draft_tokens: int | Literal["auto"] = 0,
    loading: LoadingOptions = LOADING,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve a checkpoint with OpenAI's interface: completions, chats and responses, and a page to chat on.

    Each answer equals that of a single run, whatever else runs. Beyond this machine's own address an API key is
    required: set QWEN3NEXT_API_KEY.

    $ qwen3next serve DIR
    $ qwen3next serve DIR --prefix-folder ~/prefixes --draft-tokens auto
    $ QWEN3NEXT_API_KEY=secret qwen3next serve DIR --host 0.0.0.0 --port 80

    Args:
        folder: checkpoint folder with config.json, *.safetensors and tokenizer.json.
        host: address to listen on; the default is reached from this machine only.
        port: port to listen on.
        name: name of the model in requests. Default: the folder's name.
        max_memory: memory for the keys, values and states of all requests together.
        max_waiting: requests that may wait; more are answered with 429.
        max_rows: texts that are continued together.
        prefix_memory: memory for beginnings of prompts, which later requests need not run again; 0 keeps none.
        prefix_folder: also keep them in this folder, for other and later servers.
        prefix_disk: size of that folder at most.
        draft_tokens: tokens to guess by the MTP layer and check at a time; auto chooses by what is measured.
        quiet: write only errors to stderr.
        verbose: write to stderr which implementation runs for each operation, and the traceback of an error.
    """
    try:
        import uvicorn

        from qwen3next.serving.app import Server
        from qwen3next.serving.engine import Engine
    except ModuleNotFoundError as error:
        raise ValueError(f"The server needs {error.name}: pip install 'qwen3next[serve]'.") from None
    key = os.environ.get("QWEN3NEXT_API_KEY", "")
    if not key and not _local(host):
        raise ValueError(f"{host} can be reached from other machines: set QWEN3NEXT_API_KEY, or use --host 127.0.0.1.")
    if prefix_folder is not None and not parse_bytes(prefix_memory):
        raise ValueError("--prefix-folder needs --prefix-memory above 0: prefixes pass through memory.")
    budget, tokenizer = parse_bytes(max_memory), open_tokenizer(folder)
    model = open_model(folder, loading, quiet=quiet, verbose=verbose)
    engine = Engine(
        model,
        max_memory=budget,
        max_waiting=max_waiting,
        max_rows=max_rows,
        prefix_memory=prefix_memory,
        prefix_folder=prefix_folder,
        prefix_disk=prefix_disk,
        draft_tokens=draft_tokens,
    )
    template = ChatTemplate.find(folder)
    called = name or Path(folder).resolve().name
    server = Server(engine, tokenizer, name=called, template=template, api_key=key)
    if not quiet:
        chat = "" if template else " (no chat template: completions only)"
        print(f"serving {called} at http://{host}:{port}/v1{chat}; a page to chat on at /", file=sys.stderr)
    uvicorn.run(
        server.app(), host=host, port=port, log_level="error", access_log=False, timeout_graceful_shutdown=10,
        limit_concurrency=1024, timeout_keep_alive=30,
    )  # fmt: skip


def _local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
