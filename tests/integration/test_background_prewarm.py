"""Background work: where the template rewrites an answer, the next turn is warm all the same.

Nobody waits for it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver, families, made_tokenizers as made, tiny_models
from support.cases import some_of
from support.engine_driver import RecordingSink, SteppedEngine, chunks, run

from agent_memory_core import AgentMemory, ChatRequest, Delta, EngineConfig, Message, SessionKey, ToolCall
from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.config import SamplingParams
from agent_memory_core.engine.prewarm import answer_of, lasting_prefix
from agent_memory_core.messages import InvalidToolCall
from agent_memory_core.models.loader import load_model
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import Branches
from agent_memory_core.text.chat_template import ChatTemplate
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM

Open = Callable[..., engine_driver.Driver]
MIB = 2**20
BLOCK = 64
NEW = 300

# As Qwen 3 with thinking off: a prompt for an answer holds an empty think block, which history does not.
REWRITES = made.CHATML.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'")
# As Qwen 3 with thinking on: thoughts stay until the user speaks again.
KEEPS_LAST = (
    "{%- set at = namespace(user=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' -}}"
    "{%- if m.reasoning_content and loop.index0 > at.user -%}"
    "{{- '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- '<tool_call>' ~ c.function | tojson ~ '</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)


def that_rewrites(folder: Path, config: dict[str, Any]) -> str:
    """The folder of a random model whose template rewrites answers."""
    tiny_models.write(folder, config, seed=1)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": REWRITES}))
    return str(folder)


@pytest.fixture(scope="module")
def rewriting(tmp_path_factory: pytest.TempPathFactory) -> str:
    return that_rewrites(tmp_path_factory.mktemp("models") / "rewriting", tiny_models.LLAMA)


ASK = {"role": "user", "content": "Tell me of " + "1" * 100}


def history(answer: str) -> list[dict[str, str]]:
    return [ASK, {"role": "assistant", "content": answer}, {"role": "user", "content": "And of 2?"}]


def wait_for_background_work(memory: AgentMemory, prefills: int) -> None:
    deadline = time.monotonic() + 30
    while memory.stats().background_prefills < prefills:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    memory.sessions()  # waits for what is being written


def two_turns(driver: engine_driver.Driver, prefills: int, **more: Any) -> tuple[Any, Any]:
    first = driver.memory.chat([ASK], session="s", max_tokens=NEW)
    wait_for_background_work(driver.memory, prefills)
    second = driver.memory.chat(history(first.text), session="s", max_tokens=8)
    return first, second


# The next turn


def test_the_next_turn_is_warm_with_it_and_cold_without(
    rewriting: str, open_driver: Open, tmp_path: Path
) -> None:
    warm, cold = (
        open_driver(rewriting, kv_bits=None, cache_dir=tmp_path / name, prewarm=name)
        for name in ("idle", "off")
    )
    first, second = two_turns(warm, 1)
    cold_first, cold_second = two_turns(cold, 0)
    assert first.token_ids == cold_first.token_ids
    answer = first.report.usage.completion_tokens
    assert answer > 100, "an answer worth prefilling"
    assert cold_second.report.usage.cache_creation >= answer
    assert cold_second.report.miss_reason != ""
    new = warm.memory.count_tokens(history("")[-1:])
    assert second.report.usage.cache_creation <= new
    assert second.report.miss_reason == ""
    assert second.report.usage.prompt_tokens == cold_second.report.usage.prompt_tokens
    assert second.token_ids == cold_second.token_ids


@pytest.mark.parametrize(
    "family", some_of(["qwen3_next", "mamba2", "gemma3", "gpt_oss"], ["qwen3_next", "gpt_oss"])
)
def test_layers_that_cannot_be_cut_are_as_warm(family: str, open_driver: Open, tmp_path: Path) -> None:
    config = families.with_vocabulary(families.CONFIGS[family], tiny_models.vocab_size())
    model = that_rewrites(tmp_path / family, config)
    warm, cold = (
        open_driver(model, kv_bits=None, cache_dir=tmp_path / name, prewarm=name) for name in ("idle", "off")
    )
    first = warm.memory.chat([ASK], session="s", max_tokens=80, logprobs=True)
    assert len(first.logprobs) == len(first.token_ids)
    assert first.token_ids == cold.memory.chat([ASK], session="s", max_tokens=80).token_ids
    wait_for_background_work(warm.memory, 1)
    second = [
        driver.memory.chat(history(first.text), session="s", max_tokens=1).report for driver in (warm, cold)
    ]
    new = warm.memory.count_tokens(history("")[-1:])
    assert second[0].usage.cache_creation <= new
    assert second[0].miss_reason == ""
    assert second[1].usage.cache_creation > second[0].usage.cache_creation + len(first.token_ids) // 2


def test_it_is_no_turn_and_is_counted_apart(rewriting: str, open_driver: Open) -> None:
    driver = open_driver(rewriting, prewarm="idle")
    first, second = two_turns(driver, 1)
    stats = driver.memory.stats()
    assert stats.turns == 2
    assert stats.cancelled == 0
    answer, prompt = first.report.usage.completion_tokens, second.report.usage.prompt_tokens
    assert answer <= stats.background_tokens <= prompt - BLOCK
    assert stats.cache_read == second.report.usage.cache_read


def test_where_the_template_repeats_the_answer_nothing_is_done(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, prewarm="idle")
    _, second = two_turns(driver, 0)
    assert second.report.miss_reason == ""
    assert driver.memory.stats().background_prefills == 0
    assert len(driver.prompts) == 2


def test_turn_after_turn_stays_warm(rewriting: str, open_driver: Open) -> None:
    driver = open_driver(rewriting, prewarm="idle")
    said_so_far = [ASK]
    for turn in range(4):
        result = driver.memory.chat(said_so_far, session="s", max_tokens=80)
        if turn:
            assert result.report.usage.cache_creation < 40
            assert result.report.miss_reason == ""
        wait_for_background_work(driver.memory, turn + 1)
        said_so_far = [
            *said_so_far,
            {"role": "assistant", "content": result.text},
            {"role": "user", "content": f"And of {turn}?"},
        ]


def test_what_was_prefilled_survives_kill_9(rewriting: str, open_driver: Open, tmp_path: Path) -> None:
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_background_prewarm as t
        memory = t.AgentMemory(model={rewriting!r}, cache_dir={str(tmp_path / "killed")!r}, block_tokens=64,
                               min_free_mb=0, memory_budget_mb=64, prewarm="idle")
        print(memory.chat([t.ASK], session="s", max_tokens=t.NEW).text, end="", flush=True)
        t.wait_for_background_work(memory, 1)
        memory.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    driver = open_driver(rewriting, cache_dir=tmp_path / "killed")
    result = driver.memory.chat(history(done.stdout), session="s", max_tokens=8)
    assert result.report.hit_tier == "warm"
    assert result.report.usage.cache_creation < 40


# Giving way, in steps of an engine that is driven by hand


def request(*texts: str, new: int = 8) -> ChatRequest:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
    return ChatRequest(messages, sampling=SamplingParams(max_tokens=new))


@pytest.fixture
def open_engine(rewriting: str, tmp_path: Path) -> Iterator[Callable[..., SteppedEngine]]:
    opened: list[SteppedEngine] = []
    loaded = load_model(rewriting)

    def open_one(name: str = "store", **settings: Any) -> SteppedEngine:
        defaults = {"block_tokens": BLOCK, "prefill_chunk_busy": BLOCK, "kv_bits": None, "prewarm": "idle"}
        config = EngineConfig(model=rewriting, **(defaults | settings))
        opened.append(SteppedEngine(loaded, config, 64 * MIB, BlockStore(tmp_path / name)))
        return opened[-1]

    yield open_one
    for engine in opened:
        with suppress(Exception):
            engine.fail_all(RuntimeError("over"))
            engine.close()


def turn(engine: SteppedEngine, asked: ChatRequest, session: str) -> RecordingSink:
    """A whole turn, up to the step in which background work may begin."""
    heard = RecordingSink()
    seq_id = engine.submit(asked, SessionKey(session), heard)
    run(engine, lambda: seq_id not in engine.turns)
    return heard


def interrupted(engine: SteppedEngine) -> tuple[RecordingSink, list[tuple[int, int]]]:
    """A turn, and its background work after the first two of its chunks."""
    heard = turn(engine, request(ASK["content"], new=NEW), "s")
    seen = chunks(engine)
    run(engine, lambda: len(seen) == 2)
    assert engine.busy
    assert len(heard.token_ids) > 4 * BLOCK, "two chunks are not all of it"
    return heard, seen


def test_it_takes_one_small_chunk_a_step_and_then_the_engine_sleeps(
    open_engine: Callable[..., SteppedEngine],
) -> None:
    engine = open_engine(prefill_chunk=2048)
    heard = turn(engine, request(ASK["content"], new=NEW), "s")
    seen = chunks(engine)
    while engine.step():
        pass
    assert all(length <= BLOCK for _, length in seen)
    assert len(seen) >= len(heard.token_ids) // BLOCK
    assert not engine.busy
    assert not engine.step(), "done once"


@pytest.mark.parametrize("same_session", [True, False])
def test_a_turn_that_arrives_waits_for_no_chunk_of_it(
    open_engine: Callable[..., SteppedEngine], same_session: bool
) -> None:
    engine = open_engine()
    heard, seen = interrupted(engine)
    asked = request(ASK["content"], heard.text, "And of 2?") if same_session else request("What is 7?")
    began, arrived = len(seen), RecordingSink()
    seq_id = engine.submit(asked, SessionKey("s" if same_session else "other"), arrived)
    run(engine, lambda: bool(engine.turns[seq_id].first_token))
    assert {owner for owner, _ in seen[began:]} == {seq_id}, (
        "no chunk of background work before its first token"
    )
    run(engine, lambda: seq_id not in engine.turns)
    plain = open_engine("plain", prewarm="off")
    first = turn(plain, request(ASK["content"], new=NEW), "s")
    assert first.token_ids == heard.token_ids
    assert turn(plain, asked, "s" if same_session else "other").token_ids == arrived.token_ids


def test_what_it_had_computed_is_found_when_it_begins_again(
    open_engine: Callable[..., SteppedEngine],
) -> None:
    engine = open_engine()
    heard, seen = interrupted(engine)
    idle = seen[0][0]
    turn(engine, request("What is 7?"), "other")
    while engine.step():
        pass
    assert not engine.busy
    spent = sum(length for owner, length in seen if owner != idle + 1)
    ids = lasting_prefix(engine.template, request(ASK["content"]), Message("assistant", heard.text))
    assert spent <= len(ids) - BLOCK, "both tries together computed each token once"
    branches = engine.sessions.open(engine.intake.root("default"), ("default", "s")).branches
    assert any(branch.token_ids == ids for branch in branches)


def test_a_withdrawn_one_leaves_the_session_as_it_was(
    open_engine: Callable[..., SteppedEngine], tmp_path: Path
) -> None:
    engine = open_engine()
    heard, _ = interrupted(engine)
    prompt = engine.template.encode(request(ASK["content"])).token_ids
    engine.fail_all(RuntimeError("closing"))  # what the engine's thread does when it is closed
    engine.close()
    store = BlockStore(tmp_path / "store")
    (row,) = store.catalog.branches.of_session("default", "s", engine.intake.root("default"))
    kept = store.catalog.branches.tokens(row)
    assert kept[: len(prompt)] == prompt
    assert list(kept[len(prompt) :]) == heard.token_ids[: len(kept) - len(prompt)]
    assert store.check().clean
    store.close()


def test_closing_does_not_wait_for_it(rewriting: str, tmp_path: Path) -> None:
    memory = AgentMemory(model=rewriting, cache_dir=tmp_path, min_free_mb=0, prewarm="idle")
    memory.chat([ASK], session="s", max_tokens=NEW)
    memory.close()
    with AgentMemory(model=rewriting, cache_dir=tmp_path, min_free_mb=0) as again:
        assert [info.session_id for info in again.sessions()] == ["s"]


def test_a_forgotten_session_does_not_come_back(
    open_engine: Callable[..., SteppedEngine], tmp_path: Path
) -> None:
    engine = open_engine()
    store = BlockStore(tmp_path / "store")
    interrupted(engine)
    # The turn has ended, and what is deleted has to be there.
    engine.disk.flush()
    assert engine.forget(("default", "s"))
    assert store.forget("default", "s")
    assert not engine.busy
    while engine.step():
        pass
    engine.flush()
    assert not engine.busy, "its background work is forgotten too"
    assert store.catalog.branches.sessions() == []
    other = engine.submit(request("What is 7?", new=NEW), SessionKey(), RecordingSink())
    turn(engine, request(ASK["content"], new=8), "s")
    engine.flush()
    store.forget("default", "s")  # as another process does
    assert other in engine.turns, "something is in flight all the time"
    while engine.step():
        pass
    engine.flush()
    assert store.catalog.branches.sessions() == []
    store.close()


@pytest.mark.parametrize("order", ["before the rows are read", "after they were read"])
def test_a_turn_committed_while_its_session_is_looked_up_is_not_lost(
    open_engine: Callable[..., SteppedEngine], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """The engine has not been told of the commit yet: the branch must be there once, and as the turn left it."""
    engine = open_engine(prewarm="off")
    of_session = Branches.of_session

    def while_committed(*arguments: Any) -> Any:
        if order == "before the rows are read":
            engine.disk.flush()
        found = of_session(*arguments)
        engine.disk.flush()
        return found

    for asked in (request("What is 7?"), request("What is 7?", "It is.", "And 8?")):
        seq_id = engine.submit(asked, SessionKey("s"), RecordingSink())
        while seq_id in engine.turns:
            engine.step()
        (session,) = [live for _, live in engine.sessions]
        held = [branch.token_ids for branch in session.branches]
        with monkeypatch.context() as patch:
            patch.setattr(Branches, "of_session", while_committed)
            opened = engine.sessions.open(engine.intake.root("default"), ("default", "s"))
        assert [branch.token_ids for branch in opened.branches] == held
        engine.flush()
        opened = engine.sessions.open(engine.intake.root("default"), ("default", "s"))
        assert [branch.token_ids for branch in opened.branches] == held


def test_calls_without_a_session_leave_nothing_to_do(open_engine: Callable[..., SteppedEngine]) -> None:
    engine = open_engine()
    for key in (SessionKey(), SessionKey("s", ephemeral=True)):
        seq_id = engine.submit(request(ASK["content"], new=NEW), key, RecordingSink())
        run(engine, lambda: seq_id not in engine.turns)  # noqa: B023
        assert not engine.step()


# What the template will say


def made_template(text: str) -> ChatTemplate:
    return ChatTemplate(
        made.byte_level(text, made.special("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    )


@pytest.mark.parametrize("text", [KEEPS_LAST, REWRITES, made.CHATML])
@pytest.mark.parametrize("next_word", ["Thanks.", "\n\nWell", " 1", "?", "é"])
def test_every_next_prompt_begins_with_it(text: str, next_word: str) -> None:
    template = made_template(text)
    asked, answer = request("Who?"), Message("assistant", "Ada.", reasoning="I know her.")
    ids = lasting_prefix(template, asked, answer)
    more = ChatRequest((*asked.messages, answer, Message("user", next_word)))
    real = template.encode(more).token_ids
    assert common_prefix(ids, real) == len(ids)
    assert template.tokenizer.text_of(ids).text.endswith("Ada.<|im_end|>\n<|im_start|>")
    assert "know her" not in template.tokenizer.text_of(ids).text


def test_thoughts_stay_while_tools_are_called_if_the_template_keeps_them() -> None:
    template = made_template(KEEPS_LAST)
    calls = (ToolCall("look", {"x": 1}, "a"), ToolCall("look", {"x": 2}, "b"))
    answer = Message("assistant", "", tool_calls=calls, reasoning="I will look.")
    asked = request("Who?")
    ids = lasting_prefix(template, asked, answer)
    results = (
        Message("tool", "Ada", "look", tool_call_id="a"),
        Message("tool", "Eva", "look", tool_call_id="b"),
    )
    real = template.encode(ChatRequest((*asked.messages, answer, *results))).token_ids
    assert common_prefix(ids, real) == len(ids)
    assert "I will look." in template.tokenizer.text_of(ids).text


@pytest.mark.parametrize("tokenizer", [made.llama3, made.bare, made.untemplated, made.metaspace, made.llama2])
def test_tokenizers_of_every_kind_agree_on_it(tokenizer: Any) -> None:
    template, asked = ChatTemplate(tokenizer()), request("Who?")
    answer = Message("assistant", "Her name is Ada.")
    ids = lasting_prefix(template, asked, answer)
    real = template.encode(ChatRequest((*asked.messages, answer, Message("user", "Thanks.")))).token_ids
    assert common_prefix(ids, real) == len(ids)
    assert "Ada." in template.tokenizer.text_of(ids).text


def test_an_answer_is_the_message_that_adapters_send_back() -> None:
    call = ToolCall("look", {"x": 1}, "a")
    deltas = [
        Delta(reasoning="I "),
        Delta(reasoning="see."),
        Delta("Well"),
        Delta("."),
        Delta(tool_calls=(call,), invalid_tool_calls=(InvalidToolCall("{", "no JSON"),)),
    ]
    assert answer_of(deltas) == Message("assistant", "Well.\n{", tool_calls=(call,), reasoning="I see.")
    assert answer_of([Delta("Well.")]) == Message("assistant", "Well.")


# In the adapters


def test_both_adapters_have_the_setting() -> None:
    assert ChatMLXPersistent(cache_dir=None, prewarm="idle").memory.config.prewarm == "idle"
    assert MLXPersistentLLM(cache_dir=None, prewarm="idle").memory.config.prewarm == "idle"
    assert ChatMLXPersistent(cache_dir=None).memory.config.prewarm == "off"
