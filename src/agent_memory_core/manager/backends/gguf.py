"""Models in GGUF files, run by llama-cpp-python."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent_memory_core import Cancelled, Delta, InvalidRequest, Usage
from agent_memory_core.manager.backends.base import CANCELLED, Asked, Clock, required
from agent_memory_core.manager.backends.openai import ToolCalls, to_wire, wire_tools
from agent_memory_core.manager.config import MIB, ModelConfig

_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
"""How llama.cpp names the files of a model that was split."""

_GGML_BYTES = 2
"""Bytes of a number in the KV cache where nothing else is set: float16."""


def files_of(path: str) -> list[Path]:
    """All files of a model, where it was split into several."""
    file = Path(path).expanduser()
    split = _SPLIT.search(file.name)
    if split is None:
        return [file]
    stem, count = file.name[: split.start()], int(split[1])
    return [file.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def _kv_bytes(path: str, context_length: int | None) -> int:
    """Bytes of the KV cache of the whole context, by the header of a file; 0 where it cannot be read."""
    try:
        from gguf import GGUFReader
    except ImportError:
        return 0
    fields = GGUFReader(path).fields

    def number(name: str) -> int | None:
        found = fields.get(f"{architecture}.{name}")
        return int(found.contents()) if found is not None else None

    architecture = str(fields["general.architecture"].contents())
    layers, heads = number("block_count") or 0, number("attention.head_count") or 1
    kv_heads = number("attention.head_count_kv") or heads
    head = number("attention.key_length") or (number("embedding_length") or 0) // heads
    length = context_length or number("context_length") or 0
    return 2 * layers * kv_heads * head * length * _GGML_BYTES


class LoadedGguf:
    """A `llama_cpp.Llama`, which takes one call at a time."""

    def __init__(self, llama: Any, name: str, kv_bytes: int) -> None:
        llama_cpp = required("llama_cpp", extra="gguf", what="gguf")
        self.native = llama
        self.tokenizer = llama.tokenizer()
        self.nbytes = int(llama_cpp.llama_model_size(llama.model)) + kv_bytes
        self._name = name
        self._cancel = threading.Event()
        # llama.cpp asks this between the parts of a forward pass, so a long prompt ends early too.
        self._abort = llama_cpp.ggml_abort_callback(lambda _: self._cancel.is_set())
        llama_cpp.llama_set_abort_callback(llama.ctx, self._abort, ctypes.c_void_p(None))

    def chat(self, asked: Asked) -> Iterator[Delta]:
        """Run one call."""
        request, clock = asked.request, Clock()
        if request.continue_final_message:
            raise InvalidRequest("a gguf model cannot continue a message: ask it to answer instead.")
        self._cancel = asked.cancel
        try:
            chunks = self.native.create_chat_completion(
                [to_wire(message) for message in request.messages],
                stream=True,
                **wire_tools(request),
                **_form(asked),
                **_sampling(asked),
            )
            yield from self._read(chunks, asked, clock)
        except RuntimeError as error:
            # An aborted forward pass is an error of llama_decode.
            if asked.cancel.is_set():
                raise Cancelled(CANCELLED) from error
            raise
        except ValueError as error:
            raise InvalidRequest(f"the model {self._name!r} cannot take this request: {error}") from error
        finally:
            self._cancel = threading.Event()

    def _read(self, chunks: Iterator[Any], asked: Asked, clock: Clock) -> Iterator[Delta]:
        reason, calls, completion = "stop", ToolCalls(), 0
        for chunk in chunks:
            asked.check()
            choice = chunk["choices"][0]
            clock.first()
            reason = choice.get("finish_reason") or reason
            calls.add(choice["delta"].get("tool_calls"))
            if text := choice["delta"].get("content"):
                completion += 1
                yield Delta(text=text)
        last = calls.delta()
        prompt = max(0, int(self.native.n_tokens) - completion)
        yield Delta(
            tool_calls=last.tool_calls,
            invalid_tool_calls=last.invalid_tool_calls,
            report=clock.report(self._name, reason, Usage(prompt, completion, 0)),
        )

    def cancel(self) -> None:
        """Nobody else calls it through the manager."""

    def unload(self) -> None:
        """Free the model."""
        if self.native is not None:
            self.native.close()
            self.native = self.tokenizer = None
            gc.collect()


def _form(asked: Asked) -> dict[str, Any]:
    schema = asked.request.response_schema
    if schema is None:
        return {}
    form: dict[str, Any] = {"type": "json_object"}
    return {"response_format": form | {"schema": dict(schema)} if schema else form}


def _sampling(asked: Asked) -> dict[str, Any]:
    sampling = asked.request.sampling
    return {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
    }


class GgufBackend:
    """Loads models from GGUF files."""

    def estimate(self, config: ModelConfig, limit: int) -> int:
        """All files, the KV of the whole context, and a tenth for what a forward pass computes."""
        if config.memory_mb is not None:
            return config.memory_mb * MIB
        files = files_of(config.path)
        if not all(file.is_file() for file in files):
            return 0
        weights = sum(file.stat().st_size for file in files)
        return (weights + _kv_bytes(str(files[0]), config.context_length)) * 11 // 10

    def load(self, config: ModelConfig, limit: int) -> LoadedGguf:
        """Load a file."""
        llama_cpp = required(
            "llama_cpp",
            extra="gguf",
            what="gguf",
            note=", which compiles for some minutes; CMAKE_ARGS chooses Metal or CUDA",
        )
        options = {"n_gpu_layers": -1, "verbose": False} | config.native
        llama = llama_cpp.Llama(model_path=config.path, n_ctx=config.context_length or 0, **options)
        return LoadedGguf(llama, config.name, _kv_bytes(config.path, llama.n_ctx()))
