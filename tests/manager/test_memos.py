"""Configurations for MemOS have the keys that MemOS knows, and no others; it need not be installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from support.tiny_models import TOKENIZER

from agent_memory_core import BackendMissing, InvalidSetting
from agent_memory_core.manager import ManagerConfig, ModelManager, get_llm_for_memos
from agent_memory_core.manager.memos import KEYS, register

FOLDER = str(TOKENIZER)
MODELS = [
    {
        "name": "h",
        "type": "huggingface",
        "path": FOLDER,
        "context_length": 16384,
        "parameters": {"temperature": 0.01, "max_tokens": 99, "do_sample": False},
    },
    {"name": "m", "type": "mlx", "path": "tiny-chat", "parameters": {"temperature": 0.3}},
    {"name": "o", "type": "openai", "path": "gpt", "parameters": {"api_base": "http://127.0.0.1:1/v1"}},
]

GOLDEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a folder that is managed": (
        {"backend": "huggingface", "model_path": FOLDER},
        {
            "backend": "huggingface",
            "config": {
                "model_name_or_path": FOLDER,
                "temperature": 0.01,
                "max_tokens": 99,
                "do_sample": False,
            },
        },
    ),
    "a managed model by its name": (
        {"backend": "huggingface_singleton", "model_path": "h", "top_k": 7},
        {
            "backend": "huggingface_singleton",
            "config": {
                "model_name_or_path": FOLDER,
                "temperature": 0.01,
                "max_tokens": 99,
                "do_sample": False,
                "top_k": 7,
            },
        },
    ),
    "a hub id": (
        {"backend": "huggingface", "model_path": "org/model"},
        {
            "backend": "huggingface",
            "config": {"model_name_or_path": "org/model", "max_tokens": 512, "do_sample": False},
        },
    ),
    "a managed model on MLX, through the server": (
        {"backend": "huggingface", "model_path": "m"},
        {
            "backend": "vllm",
            "config": {
                "model_name_or_path": "m",
                "api_base": "http://127.0.0.1:8000/v1",
                "api_key": "not-needed",
                "default_headers": {"X-Session-ID": "memos"},
                "temperature": 0.3,
                "max_tokens": 512,
            },
        },
    ),
    "an endpoint": (
        {"backend": "openai", "model_path": "o"},
        {
            "backend": "openai",
            "config": {
                "model_name_or_path": "gpt",
                "api_base": "http://127.0.0.1:1/v1",
                "api_key": "not-needed",
                "max_tokens": 512,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def manager() -> Any:
    with ModelManager(ManagerConfig(models=MODELS)) as made:
        yield made


@pytest.mark.parametrize("case", list(GOLDEN))
def test_what_memos_gets(case: str, manager: ModelManager) -> None:
    asked, expected = GOLDEN[case]
    found = get_llm_for_memos(**asked, manager=manager)
    assert found == expected
    assert set(found["config"]) <= set(KEYS[found["backend"]])


def test_what_memos_would_refuse_is_refused_here(manager: ModelManager) -> None:
    with pytest.raises(InvalidSetting, match="huggingface"):
        get_llm_for_memos("hugginface", FOLDER, manager=manager)
    with pytest.raises(InvalidSetting, match="context_length"):
        get_llm_for_memos("huggingface", FOLDER, manager=manager, context_length=5)
    with pytest.raises(InvalidSetting, match="model_path"):
        get_llm_for_memos("huggingface", manager=manager)


@pytest.mark.skipif(importlib.util.find_spec("memos") is not None, reason="MemOS is installed")
def test_without_memos_the_error_names_its_pins(manager: ModelManager) -> None:
    with pytest.raises(BackendMissing, match="transformers<5"):
        register(manager)
