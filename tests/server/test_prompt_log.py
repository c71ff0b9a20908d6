"""Prompts and answers in files, where whoever runs the server wants that: theirs alone, and at no answer's cost."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import http_server
from support.http_server import Running, wait_until

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.server import ServerSettings, create_app, prompt_log
from agent_memory_core.server.prompt_log import Exchange, PromptLog

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "My name is Ada."}], "max_tokens": 4}
KEYS = {"x-api-key": "the-key", "Authorization": "Bearer the-key"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "prompts"


@pytest.fixture
def logged(memory: AgentMemory, folder: Path) -> Iterator[Running]:
    with http_server.serve(memory, log_prompts=folder, api_keys=("the-key",), admin_key="root") as running:
        yield running


def written(folder: Path, count: int) -> list[dict[str, Any]]:
    """What so many files hold, the oldest first."""

    def texts() -> list[str]:
        return [path.read_text() for path in sorted(folder.iterdir())]

    # A file is there a moment before it is whole.
    wait_until(lambda: len(texts()) >= count and all(text.endswith("}\n") for text in texts()))
    assert len(texts()) == count
    return [json.loads(text) for text in texts()]


def test_a_request_and_its_answer_are_in_a_file_of_their_owner(logged: Running, folder: Path) -> None:
    with logged.http(**KEYS) as client:
        whole = client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-ID": "mine"})
        streamed = client.post("/v1/messages", json=CHAT | {"stream": True})
        refused = client.post("/v1/chat/completions", json={"messages": []})
    first, second, third = written(folder, 3)
    assert (first["request_id"], first["path"], first["status"]) == ("mine", "/v1/chat/completions", 200)
    assert (first["body"], first["answer"], first["complete"]) == (CHAT, whole.json(), True)
    assert first["namespace"].startswith("key-")
    assert (second["answer"], second["complete"]) == (streamed.text, True)
    assert (third["status"], third["answer"]) == (400, refused.json())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert not [path for path in folder.iterdir() if "the-key" in path.read_text()]


def test_what_no_client_asks_or_nobody_answers_has_no_file(logged: Running, folder: Path) -> None:
    with logged.http(**{"X-Admin-Key": "root"}) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 401
        assert client.post("/admin/seed", json={"seed": None}).status_code == 200
        assert client.post("/health").status_code == 405
        assert client.get("/v1/models", headers=KEYS).status_code == 200
        client.post("/v1/agents/import", content=b"\xff\x00", headers=KEYS)
    (only,) = written(folder, 1)
    assert (only["path"], only["body"]) == ("/v1/agents/import", "2 bytes")


@pytest.mark.parametrize("depth", [300, 3_000, 200_000])
def test_a_request_that_is_nested_too_deep_is_there_as_text(
    logged: Running, folder: Path, depth: int
) -> None:
    body = '{"messages": ' + "[" * depth + "]" * depth + "}"
    with logged.http(**KEYS) as client:
        assert client.post("/v1/chat/completions", content=body).status_code == 400
        client.post("/v1/chat/completions", json=CHAT)
    first, second = written(folder, 2)
    assert first["body"] in (body, json.loads(body) if depth < 900 else body)
    assert second["body"] == CHAT


def test_a_stream_that_its_client_left_is_there_as_far_as_it_came(logged: Running, folder: Path) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": schema}}
    body = CHAT | {"max_tokens": 8000, "stream": True, "response_format": form}
    with logged.http(**KEYS) as client, client.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
    (only,) = written(folder, 1)
    assert only["answer"].startswith("data: ")
    assert not only["complete"]


def test_a_disk_that_fails_costs_files_and_no_answer_and_is_told_once(
    logged: Running, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.rmdir()
    with logged.http(**KEYS) as client:
        for _ in range(3):
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        wait_until(lambda: len(told(caplog)) == 1)
        folder.mkdir(mode=0o700)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        wait_until(lambda: len(told(caplog)) == 2)
    assert "again" in told(caplog)[1]
    assert not [text for text in caplog.messages if "Ada" in text]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "written" in record.getMessage()]


def test_a_disk_that_does_not_answer_holds_nobody_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(prompt_log, "MOST_WAITING", 10)
    monkeypatch.setattr(prompt_log, "LAST_WORDS", 0.01)
    monkeypatch.setattr(PromptLog, "_write", lambda self, exchange: stuck.wait(60))
    prompts = PromptLog(folder)
    for number in range(3):
        prompts.add(Exchange(f"r{number}", "/v1/messages", "default", body=bytearray(b"x" * 8)))
    prompts.close()
    stuck.set()
    assert [record.levelno for record in caplog.records if "keep up" in record.getMessage()] == [
        logging.ERROR
    ]
    # The thread says so later, and what it says must not fall into the next test.
    wait_until(lambda: "prompts are written again" in caplog.messages)


def test_it_is_said_loudly_at_the_start(
    memory: AgentMemory, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_app(memory, ServerSettings())
    assert not caplog.records
    create_app(memory, ServerSettings(log_prompts=folder))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(folder) in warning.getMessage()


@pytest.mark.parametrize("mode", [0o755, 0o770, None])
def test_a_folder_that_is_not_ones_own_is_refused_by_name(
    memory: AgentMemory, folder: Path, mode: int | None
) -> None:
    if mode is None:
        folder.parent.mkdir()
        folder.write_text("a file")
    else:
        folder.mkdir(parents=True)
        folder.chmod(mode)
    with pytest.raises(InvalidSetting, match="log_prompts=") as refused:
        create_app(memory, ServerSettings(log_prompts=folder))
    assert str(folder) in str(refused.value)
