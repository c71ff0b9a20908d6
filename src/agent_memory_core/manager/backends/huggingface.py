"""Models that transformers runs, in PyTorch."""

from __future__ import annotations

import gc
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent_memory_core import Delta, InvalidRequest, ModelError, Usage
from agent_memory_core.manager.backends.base import Asked, Clock, required
from agent_memory_core.manager.backends.openai import to_wire
from agent_memory_core.manager.config import MIB, ModelConfig

log = logging.getLogger("agent_memory")

_WEIGHTS = ("*.safetensors", "*.bin")


def _required_torch() -> Any:
    return required("torch", extra="huggingface", what="huggingface")


class _Heard:
    """A streamer of transformers whose text is read piece by piece in another thread."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        from transformers import TextIteratorStreamer

        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.completion = -prompt_tokens
        """Tokens of the answer so far; the prompt is put first."""

    def put(self, value: Any) -> None:
        """Take the prompt, then each token."""
        self.completion += int(value.numel())
        self._streamer.put(value)

    def end(self) -> None:
        """The answer has ended."""
        self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        return iter(self._streamer)


class LoadedHuggingFace:
    """A model of transformers and its tokenizer; one call at a time, in a thread of its own."""

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, kv_bytes: int) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.native, self.tokenizer = model, tokenizer
        self.nbytes = sum({id(x): x.numel() * x.element_size() for x in tensors}.values()) + kv_bytes
        self._config = config

    def chat(self, asked: Asked) -> Iterator[Delta]:
        """Run one call."""
        request, clock = asked.request, Clock()
        if request.tools:
            raise InvalidRequest(
                "a huggingface model cannot call tools: use one of the type mlx, gguf or openai."
            )
        inputs = self._inputs(asked)
        prompt = int(inputs["input_ids"].shape[-1])
        heard = _Heard(self.tokenizer, prompt)
        failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        worker = threading.Thread(target=self._run, args=(inputs, asked, heard, failed), daemon=True)
        worker.start()
        try:
            yield from _texts(heard, asked, clock)
        finally:
            # The weights must not be freed under a forward pass.
            asked.cancel.set()
            worker.join()
        if not failed.empty():
            error = failed.get()
            raise ModelError(f"the model {self._config.name!r} failed: {error}") from error
        reason = "length" if heard.completion >= asked.request.sampling.max_tokens else "stop"
        yield Delta(report=clock.report(self._config.name, reason, Usage(prompt, heard.completion, 0)))

    def _inputs(self, asked: Asked) -> Any:
        request = asked.request
        inputs = self.tokenizer.apply_chat_template(
            [to_wire(message) for message in request.messages],
            add_generation_prompt=not request.continue_final_message,
            continue_final_message=request.continue_final_message,
            return_tensors="pt",
            return_dict=True,
            **request.template_kwargs,
        )
        inputs.pop("token_type_ids", None)
        limit = self._config.context_length
        length = int(inputs["input_ids"].shape[-1])
        if limit is not None and length >= limit:
            raise InvalidRequest(f"the prompt has {length} tokens, and context_length={limit}: shorten it.")
        return inputs.to(self.native.device)

    def _run(
        self, inputs: Any, asked: Asked, heard: _Heard, failed: queue.SimpleQueue[BaseException]
    ) -> None:
        torch = _required_torch()
        try:
            with torch.inference_mode():
                self.native.generate(**inputs, **self._options(asked), streamer=heard)
        except Exception as error:
            # The thread's outermost loop: its reader is told.
            log.debug("transformers failed", exc_info=True)
            failed.put(error)
        finally:
            heard.end()

    def _options(self, asked: Asked) -> dict[str, Any]:
        from transformers import StoppingCriteriaList

        torch = _required_torch()
        sampling = asked.request.sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        options: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "do_sample": sampling.temperature > 0,
            "repetition_penalty": sampling.repetition_penalty,
            "stopping_criteria": StoppingCriteriaList(
                [lambda ids, scores: torch.full((ids.shape[0],), asked.cancel.is_set(), device=ids.device)]
            ),
        }
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            options |= {"min_p": sampling.min_p} if sampling.min_p else {}
        if sampling.stop:
            options |= {"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer}
        if asked.request.response_schema is not None:
            options["logits_processor"] = [_grammar(self.tokenizer, asked.request.response_schema)]
        return options

    def cancel(self) -> None:
        """Nobody else calls it through the manager."""

    def unload(self) -> None:
        """Free the model."""
        if self.native is not None:
            self.native = self.tokenizer = None
            gc.collect()
            torch = _required_torch()
            for device in (torch.cuda, torch.mps):
                if device.is_available():
                    device.empty_cache()


def _texts(heard: _Heard, asked: Asked, clock: Clock) -> Iterator[Delta]:
    """The answer without what it ends with, where a stop text ended it."""
    stops = asked.request.sampling.stop
    held = ""
    for piece in heard:
        asked.check()
        clock.first()
        held += piece
        ends = [held.find(stop) for stop in stops if stop in held]
        if ends:
            held = held[: min(ends)]
            break
        kept = max((_overlap(held, stop) for stop in stops), default=0)
        said, held = held[: len(held) - kept], held[len(held) - kept :]
        if said:
            yield Delta(text=said)
    asked.check()
    if held:
        yield Delta(text=held)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def _grammar(tokenizer: Any, schema: Mapping[str, Any]) -> Any:
    """A logits processor that holds the answer to a JSON schema.

    Raises:
        InvalidRequest: the schema cannot be held to.
    """
    # Imported here because the command line imports this module only to print its help.
    import numpy as np

    llguidance = required("llguidance", extra="grammar", what="huggingface")
    bits, torch = required("llguidance.numpy", extra="grammar", what="huggingface"), _required_torch()
    words = required("llguidance.hf", extra="grammar", what="huggingface").from_tokenizer(tokenizer)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(dict(schema) or {"type": "object"})
    matcher = llguidance.LLMatcher(words, grammar)
    if matcher.is_error():
        raise InvalidRequest(f"response_schema is not valid: {matcher.get_error()}")
    mask = bits.allocate_token_bitmask(1, words.vocab_size)
    begun = False

    def process(ids: Any, scores: Any) -> Any:
        nonlocal begun
        if begun:
            matcher.consume_token(int(ids[0, -1]))
        begun = True
        bits.fill_next_token_bitmask(matcher, mask, 0)
        allowed = torch.from_numpy(np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool))
        width = min(scores.shape[-1], words.vocab_size)
        held = torch.full_like(scores, float("-inf"))
        held[0, :width] = scores[0, :width].masked_fill(~allowed[:width].to(scores.device), float("-inf"))
        return held

    return process


class HuggingFaceBackend:
    """Loads models with transformers."""

    def estimate(self, config: ModelConfig, limit: int) -> int:
        """The weight files; a hub id whose files are not here counts nothing until it is loaded."""
        if config.memory_mb is not None:
            return config.memory_mb * MIB
        folder = Path(config.path).expanduser()
        for pattern in _WEIGHTS:
            if found := [file.stat().st_size for file in folder.glob(pattern)]:
                return sum(found)
        return 0

    def load(self, config: ModelConfig, limit: int) -> LoadedHuggingFace:
        """Load a folder or hub id."""
        torch, transformers = (
            _required_torch(),
            required("transformers", extra="huggingface", what="huggingface"),
        )
        native = dict(config.native)
        trusts = {"trust_remote_code": bool(native.pop("trust_remote_code", False))}
        dtype = native.pop("dtype", "auto")
        if native.get("device_map") is not None:
            # Only with it does transformers spread a model over devices.
            required("accelerate", extra="huggingface", what="huggingface")
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.path, **trusts)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.path, dtype=dtype, **native, **trusts
        )
        if native.get("device_map") is None:
            model = model.to(_device(torch))
        return LoadedHuggingFace(model.eval(), tokenizer, config, _kv_bytes(model, config.context_length))


def _device(torch: Any) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _kv_bytes(model: Any, context_length: int | None) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = context_length or getattr(config, "max_position_embeddings", 0)
    return int(2 * config.num_hidden_layers * heads * head * length * model.dtype.itemsize)
