"""What a profile says reaches the turns of its model, by way of the public face."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver, tiny_models

from agent_memory_core import AgentMemory, ChatRequest, InvalidSetting, Message, PromptTooLong

TEMPLATE = "{%- if enable_thinking -%}THINK{%- else -%}PLAIN{%- endif -%}{{- messages[0].content -}}"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes the folder of a random model ``mine`` and a profile of it with these lines."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("AGENT_MEMORY_MODEL_CONFIGS", str(own))

    def make(lines: str, template: str | None = None, **config: Any) -> str:
        folder = tiny_models.write(tmp_path / "mine", tiny_models.LLAMA | config)
        if template is not None:
            path = Path(folder) / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        (own / "mine.toml").write_text(f'[model]\nmodel_id = "mine"\n{lines}')
        return folder

    return make


def prompt(driver: engine_driver.Driver) -> str:
    tokenizer = driver.engine(lambda engine: engine.loaded.tokenizer)
    return str(tokenizer.decode(driver.prompts[-1]))


@pytest.mark.parametrize("thinks", [True, False])
def test_whether_it_thinks_is_told_to_the_chat_template(
    model: Callable[..., str], open_driver: Callable[..., engine_driver.Driver], thinks: bool
) -> None:
    said = f"[inference]\nsupports_thinking = true\nextended_thinking = {str(thinks).lower()}\n"
    driver = open_driver(model(said, TEMPLATE))
    driver.turn([{"role": "user", "content": "hello"}], "s")
    assert prompt(driver) == ("THINK" if thinks else "PLAIN") + "hello"
    driver.memory.chat(ChatRequest((Message("user", "hallo"),)), session="r")
    assert prompt(driver) == ("THINK" if thinks else "PLAIN") + "hallo"
    request = ChatRequest((Message("user", "hello"),), template_kwargs={"enable_thinking": not thinks})
    driver.memory.chat(request, session="t")
    assert prompt(driver) == ("PLAIN" if thinks else "THINK") + "hello"


def test_a_context_length_counts_where_the_models_config_states_none(model: Callable[..., str]) -> None:
    folder = model("[thresholds]\ncontext_length = 48000\n")
    config = Path(folder) / "config.json"
    said = json.loads(config.read_text())
    del said["max_position_embeddings"]
    config.write_text(json.dumps(said))
    with AgentMemory(model=folder, cache_dir=None, memory_budget_mb=64) as memory:
        assert memory.context_length == 48000
        memory.load()
        assert memory._thread.call(lambda engine: engine.limits.context_length).result() == 48000


def test_a_context_length_bounds_the_prompts_of_its_model(model: Callable[..., str]) -> None:
    folder = model("[thresholds]\ncontext_length = 64\n")
    with AgentMemory(model=folder, cache_dir=None, memory_budget_mb=64) as memory:
        assert memory.context_length == 64
        with pytest.raises(PromptTooLong, match="64"):
            memory.chat("A long story. " * 64)


def test_a_profile_of_another_model_stops_the_load(model: Callable[..., str]) -> None:
    folder = model("n_layers = 3\n")
    with (
        AgentMemory(model=folder, cache_dir=None) as memory,
        pytest.raises(InvalidSetting, match="n_layers = 3, but the loaded model has 2"),
    ):
        memory.load()


def test_what_the_config_says_and_the_caches_do_not_is_logged(
    model: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agent_memory")
    with AgentMemory(model=model("n_layers = 2\n", sliding_window=512), cache_dir=None) as memory:
        memory.load()
    assert "sliding_window = 512, but the live caches have no window" in caplog.text
