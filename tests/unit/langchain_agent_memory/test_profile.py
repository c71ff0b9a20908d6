"""The profile of a model, as LangChain's agents and middleware ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_core.language_models.model_profile import ModelProfile

from langchain_agent_memory import ChatMLXPersistent


def test_what_is_known_without_loading_is_told() -> None:
    profile = ChatMLXPersistent(model="tiny-chat", cache_dir=None, max_tokens=99).profile
    assert profile is not None
    assert profile["max_input_tokens"] == 8192
    assert profile["max_output_tokens"] == 99
    assert profile["reasoning_output"] is False
    assert profile["image_inputs"] is False
    assert set(profile) <= set(ModelProfile.__annotations__), "LangChain warns of others"


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_model_that_thinks_says_so(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text('{"chat_template": "{{ messages }}<think>"}')
    profile = ChatMLXPersistent(model=str(tmp_path), cache_dir=None).profile
    assert profile is not None
    assert profile["reasoning_output"] is True


def test_what_is_not_known_yet_is_left_out() -> None:
    profile = ChatMLXPersistent(model="mlx-community/Some-4bit", cache_dir=None).profile
    assert profile is not None
    assert not {"max_input_tokens", "reasoning_output"} & profile.keys()
