"""Configurations of a language model for MemOS, which is not needed to make them.

MemOS keeps activation memory (KV caches) of its own with backends huggingface and huggingface_singleton, in
`KVCacheMemory`, and reaches servers with vllm, in `vllm_kv_cache`. The keys are those of MemoryOS 2.0.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_memory_core import BackendMissing, InvalidSetting
from agent_memory_core.manager.config import ModelConfig
from agent_memory_core.manager.integration import get_model_manager
from agent_memory_core.manager.manager import ModelManager
from agent_memory_core.manager.parameters import near

log = logging.getLogger("agent_memory")

SERVER_VARIABLE = "AGENT_MEMORY_SERVER_URL"
"""Where the server of this package answers, for models on MLX."""

DEFAULT_SERVER = "http://127.0.0.1:8000/v1"

_HF_KEYS = (
    "model_name_or_path",
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "remove_think_prefix",
    "default_headers",
    "do_sample",
    "add_generation_prompt",
)
_SERVER_KEYS = (
    "model_name_or_path",
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "remove_think_prefix",
    "default_headers",
    "api_key",
    "api_base",
)
KEYS: Mapping[str, tuple[str, ...]] = {
    "huggingface": _HF_KEYS,
    "huggingface_singleton": _HF_KEYS,
    "vllm": _SERVER_KEYS,
    "openai": _SERVER_KEYS,
}
"""The backends of MemOS that this module writes, and the keys that each one accepts: others are refused there."""

BACKENDS = (*KEYS, "mlx")
"""What `get_llm_for_memos` accepts: mlx is a server of this package, which MemOS reaches as vllm."""


def get_llm_for_memos(
    backend: str = "huggingface",
    model_path: str | None = None,
    *,
    manager: ModelManager | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """A configuration for an ``extractor_llm`` or ``chat_model`` of MemOS.

    Args:
        backend: one of `BACKENDS`.
        model_path: a folder, a hub id, or the name of a managed model, whose sampling is taken over. A managed model
            on MLX is reached through the server, whatever the backend.
        manager: the manager whose models are known; None is that of the process.
        overrides: further keys, which go before the model's own.

    Returns:
        ``{"backend": ..., "config": {...}}``.

    Raises:
        InvalidSetting: the backend or a key is unknown to MemOS, or no model is named.
    """
    if backend not in BACKENDS:
        raise InvalidSetting(f"backend={backend!r} is not valid: {near(backend, BACKENDS)}")
    if model_path is None:
        raise InvalidSetting("model_path is missing: a folder, a hub id, or the name of a managed model.")
    found = _managed(manager or get_model_manager(), model_path)
    if backend == "mlx" or (found is not None and found.type == "mlx"):
        backend, own = "vllm", _served(found.name if found is not None else model_path)
        log.info("MemOS keeps the KV of a served model with the act_mem backend vllm_kv_cache")
    elif backend == "openai":
        own = _endpoint(found, model_path)
    else:
        own = {
            "model_name_or_path": found.path if found is not None and found.name == model_path else model_path
        }
    config = own | _sampling(found, backend) | overrides
    for key in config:
        if key not in KEYS[backend]:
            raise InvalidSetting(
                f"{key!r} is no key of the backend {backend!r} of MemOS: {near(key, KEYS[backend])}"
            )
    return {"backend": backend, "config": config}


def _managed(manager: ModelManager, path: str) -> ModelConfig | None:
    """The configuration of the model of that name or path."""
    resolved = str(Path(path).expanduser().resolve())
    for name in manager.list_available_models():
        config = manager.get_model(name, load=False).config
        if path in (name, config.path) or resolved == config.path:
            return config
    return None


def _sampling(config: ModelConfig | None, backend: str) -> dict[str, Any]:
    parameters = config.parameters if config is not None else {}
    defaults = {"max_tokens": 512, "do_sample": False} | parameters
    return {
        name: defaults[name]
        for name in ("temperature", "max_tokens", "top_p", "top_k", "do_sample")
        if name in defaults and name in KEYS[backend]
    }


def _served(model: str) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "api_base": os.environ.get(SERVER_VARIABLE, DEFAULT_SERVER),
        "api_key": "not-needed",
        "default_headers": {"X-Session-ID": "memos"},
    }


def _endpoint(config: ModelConfig | None, model_path: str) -> dict[str, Any]:
    from agent_memory_core.manager.backends.openai import api_key_of

    made = config if config is not None else ModelConfig(name=model_path, type="openai", path=model_path)
    base = made.native.get("api_base", "https://api.openai.com/v1")
    return {"model_name_or_path": made.path, "api_base": base, "api_key": api_key_of(made)}


def register(manager: ModelManager | None = None) -> None:
    """Let MemOS's ``huggingface_singleton`` models of a managed folder use the managed weights instead of their own.

    A model of MemOS holds a lease for as long as it lives.

    Raises:
        BackendMissing: MemOS is not installed.
    """
    try:
        from memos.llms.factory import LLMFactory
        from memos.llms.hf import HFLLM
    except ImportError as error:
        raise BackendMissing(
            "MemOS is not installed. MemoryOS 2.0 pins transformers<5 and openai<2, so it needs an environment of its "
            f"own, with this package's extra huggingface and those pins ({error})."
        ) from error
    known = manager or get_model_manager()

    class ManagedHFLLM(HFLLM):  # type: ignore[misc]
        """A model of MemOS on managed weights; on its own where its folder is not managed."""

        def __init__(self, config: Any) -> None:
            found = _managed(known, config.model_name_or_path)
            if found is None or found.type != "huggingface":
                super().__init__(config)
                return
            managed = known.get_model(found.name)
            self.config = config
            self.model, release = managed.hold()
            self.tokenizer = managed.tokenizer
            self.logits_processors = _processors(config)
            weakref.finalize(self, release)

    LLMFactory.backend_to_class["huggingface_singleton"] = ManagedHFLLM


def _processors(config: Any) -> Any:
    """What MemOS samples with, by its own settings, as its own class makes it."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors: list[Any] = []
    if config.temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(config.top_k))
    if 0.0 < config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p))
    return LogitsProcessorList(processors)
