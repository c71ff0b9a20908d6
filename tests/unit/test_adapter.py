"""The settings that both adapters have: declared once, and told apart from what was not set."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from agent_memory_core import AdapterSettings, InvalidSetting
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


def test_every_field_of_the_engine_and_of_sampling_is_one() -> None:
    for settings in EVERY:
        assert {*settings.ENGINE_FIELDS, *settings.SAMPLING_FIELDS} < set(settings.model_fields)


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
