"""Models in GGUF files, run by llama-cpp-python on the embedded model written as such a file: make test-gguf."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import gguf_model
from support.same_weights import HISTORY, SCHEMA, beside_mlx

from agent_memory_core import BackendMissing, Cancelled, InvalidRequest
from agent_memory_core.manager import ManagerConfig, ModelManager

try:
    import llama_cpp  # noqa: F401

    HAS_LLAMA = True
except ImportError:
    HAS_LLAMA = False

needs_llama = pytest.mark.skipif(not HAS_LLAMA, reason="llama-cpp-python is not installed: make test-gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model as a GGUF file."""
    pytest.importorskip("gguf")
    return gguf_model.write(tmp_path_factory.mktemp("gguf") / "tiny-chat.gguf")


@pytest.fixture
def manager(file: str) -> Iterator[ModelManager]:
    parameters = {"max_tokens": 24, "n_gpu_layers": 0, "n_threads": 1, "temperature": 0}
    model = {"name": "g", "type": "gguf", "path": file, "context_length": 2048, "parameters": parameters}
    with beside_mlx(model) as made:
        yield made


@pytest.mark.skipif(HAS_LLAMA, reason="llama-cpp-python is installed")
def test_without_the_library_the_error_names_what_to_install(tmp_path: Path) -> None:
    model = {"name": "g", "type": "gguf", "path": str(tmp_path / "g.gguf")}
    with (
        ModelManager(ManagerConfig(models=[model])) as manager,
        pytest.raises(BackendMissing, match=r"\[gguf\]"),
    ):
        manager.get_model("g")


@needs_llama
def test_it_answers_as_the_same_weights_on_mlx(manager: ModelManager) -> None:
    answer = manager.get_model("g").chat(HISTORY)
    assert answer.text == manager.get_model("m").chat(HISTORY).text
    report = answer.report
    assert (report.finish_reason, report.hit_tier, report.persisted) == ("stop", "none", False)
    same = manager.get_model("m").chat(HISTORY).report.usage
    assert report.usage.prompt_tokens == same.prompt_tokens
    assert abs(report.usage.completion_tokens - same.completion_tokens) <= 1, "one is the end of the answer"


@needs_llama
def test_it_streams_and_stops_where_it_is_told(manager: ModelManager) -> None:
    model = manager.get_model("g")
    with model.stream(HISTORY, stop=["Ada"]) as answer:
        deltas = list(answer)
    assert len(deltas) > 2
    assert "Ada" not in "".join(delta.text for delta in deltas)
    assert model.chat(HISTORY, max_tokens=2).report.finish_reason == "length"
    assert model.create_completion("My name is", max_tokens=2)["choices"][0]["text"], (
        "the library's own calls too"
    )


@needs_llama
def test_its_answer_fits_a_schema(manager: ModelManager) -> None:
    import json

    answer = manager.get_model("g").chat("Where is the Colosseum?", response_schema=SCHEMA)
    assert json.loads(answer.text)["city"] in ("Rome", "Paris")


@needs_llama
def test_calls_run_one_after_another_and_a_forced_unload_cancels_them(manager: ModelManager) -> None:
    model = manager.get_model("g")
    expected = model.chat(HISTORY).text
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: model.chat(HISTORY).text, range(3))) == [expected] * 3
    stream = model.stream("Tell me a story.", max_tokens=1500, stop=[], response_schema={"type": "array"})
    next(stream)
    assert not manager.unload_model("g")
    assert manager.unload_model("g", force=True, timeout=0)
    with pytest.raises(Cancelled):
        list(stream)
    assert model.chat(HISTORY).text == expected


@needs_llama
def test_a_long_prompt_is_withdrawn_while_it_is_read(manager: ModelManager) -> None:
    model = manager.get_model("g")
    with ThreadPoolExecutor(1) as pool:
        stream = model.stream("7" * 1900)
        reading = pool.submit(list, stream)
        while not stream._reading.locked():
            pass
        stream.close()
        with pytest.raises(Cancelled):
            reading.result(60)
    assert model.chat(HISTORY).text


@needs_llama
def test_what_is_measured_is_near_what_was_estimated(manager: ModelManager, file: str) -> None:
    estimate = manager.estimate("g")
    manager.get_model("g")
    taken = manager.estimate("g")
    assert taken >= Path(file).stat().st_size * 0.9
    assert taken <= estimate <= taken * 1.2


@needs_llama
def test_what_it_cannot_do_is_refused(manager: ModelManager) -> None:
    with pytest.raises(InvalidRequest):
        manager.get_model("g").chat("7" * 20000)
