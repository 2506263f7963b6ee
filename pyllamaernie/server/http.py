"""The bundled llama-server with model, projector, chat template and web page filled in.

`arguments` are its words; the verb `serve` replaces its process by it. `Server` runs one as a child, for programs and
tests. Requests, answers and errors are upstream's HTTP API, which OpenAI clients speak.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyllamaernie import programs
from pyllamaernie.errors import PyllamaernieError
from pyllamaernie.llama import rpc
from pyllamaernie.server.address import require_free_port

WEB = Path(__file__).parent / "web"
START_S = 600.0


def arguments(
    model: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = "auto",
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    n_ctx: int | None = None,
    n_parallel: int | None = None,
    n_threads: int | None = None,
    rpc_servers: Sequence[str] = (),
) -> list[str]:
    """The words after `llama-server` for a model; the files are checked and the workers asked.

    Raises: as `Llama` for wrong files, RpcError for a worker.
    """
    from pyllamaernie import _core
    from pyllamaernie.gguf.header import check_text_model, read_header
    from pyllamaernie.gguf.projector import find_projector
    from pyllamaernie.llama.context import default_n_ctx
    from pyllamaernie.llama.keywords import TEMPERATURE
    from pyllamaernie.llama.options import embedded_model, engine_template
    from pyllamaernie.llama.reasoning import Thinking
    from pyllamaernie.machine import n_cpu

    header = read_header(embedded_model() if model is None else model)
    check_text_model(header)
    projector = find_projector(header, mmproj)
    template = header.metadata.get("tokenizer.chat_template")
    words = ["--model", str(header.path), "--alias", header.path.stem, "--host", host, "--port", str(port)]
    words += ["--ctx-size", str(n_ctx or default_n_ctx(header, 2.0)), "--threads", str(n_threads or n_cpu())]
    words += ["--path", str(WEB), "--cors-origins", "localhost", "--jinja"]
    words += ["--temp", str(0 if model is None else TEMPERATURE)]
    words += ["--mmproj", str(projector.path)] if projector is not None else ["--no-mmproj"]
    if n_parallel is not None:
        words += ["--parallel", str(n_parallel), "--kv-unified"]
    if template:
        words += ["--chat-template", engine_template(template)]
        variables = Thinking(template, header.arch).defaults()
        words += ["--chat-template-kwargs", json.dumps(variables)] if variables else []
    if rpc_servers:
        rpc.check(rpc_servers)
        words += ["--rpc", ",".join(rpc_servers), "--n-gpu-layers", "all"]
        if not _core.gpu_devices(False):
            words.append("--no-mmproj-offload")  # the projector stays here; a worker would be taken for a GPU
    return words


class Server:
    """A llama-server child on loopback, stopped when the block ends. `base_url` is for OpenAI clients.

    `log_path` holds what the server printed. Raises: PyllamaernieError with the log's end when it does not start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = "auto",
        *,
        port: int = 0,
        api_key: str | None = None,
        timeout_s: float = START_S,
        args: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.port = require_free_port("127.0.0.1", port)
        self.api_key = api_key
        words = arguments(model, mmproj, port=self.port, **options)
        self._log = tempfile.NamedTemporaryFile(prefix="pyllamaernie-serve-", suffix=".log")
        self.log_path = Path(self._log.name)
        command = [str(programs.path("llama-server")), *words, *args]
        environment = {**programs.environment(), **({"LLAMA_API_KEY": api_key} if api_key else {})}
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            self._wait(timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where the web page is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def openai_client(self, **options: Any) -> Any:
        """An `openai.OpenAI` for this server (package `openai`)."""
        import openai

        return openai.OpenAI(base_url=self.base_url, api_key=self.api_key or "none", **options)

    def close(self) -> None:
        """Stop the server; a second time does nothing."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise PyllamaernieError(f"llama-server ended with code {self.process.returncode}: {self._last_lines()}")
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                link.request("GET", "/health")
                if link.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                link.close()
            time.sleep(0.05)
        raise PyllamaernieError(f"llama-server did not load the model within {timeout_s:g} s: {self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log_path.read_text("utf-8", "replace").split("\n")
        return " | ".join(line.strip() for line in lines[-8:] if line.strip()) or "it printed nothing"
