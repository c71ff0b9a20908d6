"""Models that transformers runs, on the embedded model, which it loads as it is: make test-huggingface."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.same_weights import HISTORY, SCHEMA, beside_mlx
from support.tiny_models import TOKENIZER

from agent_memory_core import BackendMissing, Cancelled, InvalidRequest
from agent_memory_core.manager import ModelManager

HAS_TORCH = importlib.util.find_spec("torch") is not None

needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: make test-huggingface")


@pytest.fixture
def manager() -> Iterator[ModelManager]:
    parameters = {"max_tokens": 24, "do_sample": False, "torch_dtype": "float32"}
    model = {"name": "h", "type": "huggingface", "path": str(TOKENIZER), "parameters": parameters}
    with beside_mlx(model) as made:
        yield made


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed")
def test_without_the_library_the_error_names_what_to_install(manager: ModelManager) -> None:
    with pytest.raises(BackendMissing, match=r"\[huggingface\]"):
        manager.get_model("h")


@needs_torch
def test_it_answers_as_the_same_weights_on_mlx(manager: ModelManager) -> None:
    answer = manager.get_model("h").chat(HISTORY)
    other = manager.get_model("m").chat(HISTORY)
    assert answer.text == other.text
    assert answer.report.usage.prompt_tokens == other.report.usage.prompt_tokens
    assert (answer.report.finish_reason, answer.report.persisted) == ("stop", False)


@needs_torch
def test_it_streams_and_stops_where_it_is_told(manager: ModelManager) -> None:
    model = manager.get_model("h")
    whole = model.chat(HISTORY).text
    with model.stream(HISTORY) as answer:
        deltas = list(answer)
    assert len(deltas) > 2
    assert "".join(delta.text for delta in deltas) == whole
    assert model.chat(HISTORY, stop=["Ada"]).text == whole.partition("Ada")[0]
    assert model.chat(HISTORY, max_tokens=2).report.finish_reason == "length"


@needs_torch
def test_its_answer_fits_a_schema(manager: ModelManager) -> None:
    answer = manager.get_model("h").chat("Where is the Colosseum?", response_schema=SCHEMA)
    assert json.loads(answer.text)["city"] in ("Rome", "Paris")


@needs_torch
def test_the_model_of_the_library_is_used_as_before(manager: ModelManager) -> None:
    model = manager.get_model("h")
    inputs: Any = model.tokenizer("My name is", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    assert model.generate(**inputs, max_new_tokens=3).shape[-1] <= inputs["input_ids"].shape[-1] + 3
    assert model.generate(inputs["input_ids"], max_new_tokens=3).shape[0] == 1
    assert model.config.name == "h", "its configuration here"
    assert model.device.type in ("cpu", "mps", "cuda")
    assert isinstance(model.generate("Hello."), str)


@needs_torch
def test_a_forced_unload_cancels_a_stream(manager: ModelManager) -> None:
    model = manager.get_model("h")
    expected = model.chat(HISTORY).text
    stream = model.stream("Tell me a story.", max_tokens=4000, response_schema={"type": "array"})
    next(stream)
    assert not manager.unload_model("h")
    assert manager.unload_model("h", force=True, timeout=0)
    with pytest.raises(Cancelled):
        list(stream)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: model.chat(HISTORY).text, range(3))) == [expected] * 3


@needs_torch
def test_what_it_cannot_do_is_refused(manager: ModelManager) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(InvalidRequest, match="tools"):
        manager.get_model("h").chat("Hello.", tools=[tool])
