"""What both adapters share: fields for every setting, which of them the user has set, and tool choices."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from llama_index.core.llms.function_calling import FunctionCallingLLM

from agent_memory_core import (
    AdapterSettings,
    AgentMemory,
    EngineConfig,
    InvalidRequest,
    InvalidSetting,
    SamplingParams,
)
from agent_memory_core.adapter import chosen_tool
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM

ADAPTERS: list[type[AdapterSettings]] = [ChatMLXPersistent, MLXPersistentLLM]
EVERY: list[type[AdapterSettings]] = [AdapterSettings, *ADAPTERS]
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


@each_adapter
def test_an_adapter_declares_no_shared_field_again(adapter: type[AdapterSettings]) -> None:
    own = set(inspect.get_annotations(adapter))
    assert issubclass(adapter, AdapterSettings)
    assert not own & set(AdapterSettings.model_fields)
    assert set(AdapterSettings.model_fields) < set(adapter.model_fields)


@pytest.mark.parametrize("settings", EVERY)
@pytest.mark.parametrize("name", EngineConfig.model_fields)
def test_every_setting_of_the_engine_is_a_field(settings: type[AdapterSettings], name: str) -> None:
    field = settings.model_fields[name]
    assert settings.ENGINE_FIELDS[name] == name
    assert field.description == EngineConfig.model_fields[name].description


def test_every_sampling_value_is_a_field_or_an_option_that_is_named_here() -> None:
    names = set(SamplingParams.model_fields)
    for settings in (ChatMLXPersistent, MLXPersistentLLM):
        assert names <= settings.model_fields.keys()
        assert {*settings.SAMPLING_FIELDS, "stop"} == names


@pytest.mark.parametrize(
    ("adapter", "framework"), [(ChatMLXPersistent, BaseChatModel), (MLXPersistentLLM, FunctionCallingLLM)]
)
def test_every_field_of_ours_is_described(adapter: type[AdapterSettings], framework: Any) -> None:
    for name in adapter.model_fields.keys() - framework.model_fields.keys():
        assert (adapter.model_fields[name].description or "").endswith("."), name


@each_adapter
def test_every_setting_reaches_the_engine(adapter: type[AdapterSettings], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": str(tmp_path / "m"),
        "adapter_path": str(tmp_path / "a"),
        "cache_dir": str(tmp_path / "c"),
        "kv_bits": None,
        "prewarm": "idle",
        "batching": "never",
        "wired": "on",
        "compute_dtype": "float32",
        "durability": "power",
        "encryption": "env",
        "cold_url": "memory://settings",
        "cold_ack": "remote",
        "control_words": "tokens",
        "block_tokens": 64,
    }
    numbers = {name: 64 + i for i, name in enumerate(EngineConfig.model_fields.keys() - values.keys())}
    config = adapter(**values, **numbers).memory.config
    assert config == EngineConfig(**values, **numbers)
    assert {
        name for name in values | numbers if getattr(config, name) == getattr(EngineConfig(), name)
    } == set()


@pytest.mark.parametrize("settings", EVERY)
def test_a_default_is_never_the_users_word(settings: type[AdapterSettings]) -> None:
    given: dict[str, Any] = {"kv_bits": None, "max_tokens": 9, "top_k": None}
    anew = settings(**{name: getattr(settings(**given), name) for name in settings.model_fields})
    for one in (settings(**given), pickle.loads(pickle.dumps(settings(**given))), anew):
        assert one._settings() == {"kv_bits": None}
        assert one._given(one.SAMPLING_FIELDS) == {"max_tokens": 9}
    assert settings()._settings("other") == {"model": "other", "adapter_path": None}


@pytest.mark.parametrize("settings", EVERY)
def test_an_impossible_value_is_refused_at_once(settings: type[AdapterSettings]) -> None:
    with pytest.raises(ValueError, match="max_batch_size=0 is not valid") as refused:
        settings(max_batch_size=0)
    assert isinstance(refused.value.errors()[0]["ctx"]["error"], InvalidSetting)  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", EVERY)
def test_both_names_are_taken(settings: type[AdapterSettings]) -> None:
    names: dict[str, Any] = {"model_name": "m", "max_completion_tokens": 5, "stop_sequences": ["x"]}
    told = settings(**names)
    assert (told.model, told.max_tokens, told.stop) == ("m", 5, ["x"])


def test_every_spelling_of_a_folder_is_one_memory_through_both_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    spellings: list[Any] = ["d", "d/", "./d", "link", tmp_path / "d", Path("d")]
    memories = [
        made(model=d, cache_dir=None)
        for d in spellings
        for made in (AgentMemory.shared, *map(memory_of, ADAPTERS))
    ]
    assert len(memories) == 18
    assert len(set(memories)) == 1
    monkeypatch.setenv("AGENT_MEMORY_MODEL", "./d")
    assert AgentMemory.shared(cache_dir=None) is memories[0]
    assert memories[0].model_name == "d"


def memory_of(adapter: type[AdapterSettings]) -> Callable[..., AgentMemory]:
    return lambda **settings: adapter(**settings).memory


@each_adapter
def test_adapters_of_a_model_are_for_that_model_however_it_is_spelled(
    adapter: type[AdapterSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    own = adapter(model="d", adapter_path="lora")
    assert own._settings("./d")["adapter_path"] == str(tmp_path / "lora")
    assert own._settings("e")["adapter_path"] is None


def test_two_names_of_one_setting_must_agree() -> None:
    assert MLXPersistentLLM(context_window=5, context_length=5)._settings() == {"context_length": 5}
    with pytest.raises(ValueError, match="context_window=5 and context_length=6 disagree"):
        MLXPersistentLLM(context_window=5, context_length=6)


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "clock")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (False, None),
        ("auto", None),
        ({"type": "auto"}, None),
        ("none", "none"),
        (True, "required"),
        ("any", "required"),
        ("required", "required"),
        ({"type": "any"}, "required"),
        ("clock", "clock"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "tool", "name": "add"}, "add"),
    ],
)
def test_every_form_of_tool_choice(value: object, expected: str | None) -> None:
    assert chosen_tool(value, TOOLS) == expected


def test_a_required_tool_is_any_tool_unless_one_is_named() -> None:
    assert chosen_tool(None, TOOLS, required=True) == "required"
    assert chosen_tool("auto", TOOLS, required=True) == "required"
    assert chosen_tool("clock", TOOLS, required=True) == "clock"


@pytest.mark.parametrize("value", ["subtract", {"type": "function"}, 3, {"function": {"name": "nobody"}}, {}])
def test_an_impossible_tool_choice_says_what_is_there(value: object) -> None:
    with pytest.raises(InvalidRequest, match="add, clock"):
        chosen_tool(value, TOOLS)
    with pytest.raises(InvalidRequest, match="no tool"):
        chosen_tool(None, [], required=True)
