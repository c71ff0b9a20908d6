"""An agent as one file, to be carried to another machine: who it is, what was said, and its session.

    agent-memory agent 1
    {"agent_id": ..., "agent_type": ..., "system_prompt": ..., "metadata": ..., "messages": [...], ...}
    the session, as `AgentMemory.export_session` writes it; nothing where it has none on disk

Nothing in it is encrypted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from agent_memory_core import AgentMemory, InvalidRequest, Message, SessionNotFound, StoreError
from agent_memory_core.agents.book import AgentRecord, from_json, to_json

_FIRST = b"agent-memory agent 1\n"
_MOST_LINE = 2**28


def write_agent(
    memory: AgentMemory, namespace: str, record: AgentRecord, messages: Sequence[Message], path: Path
) -> None:
    """Write an agent to a file, mode 0600, whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    said = {**asdict(record), "messages": [to_json(message) for message in messages]}
    with _written(path) as file:
        file.write(_FIRST + json.dumps(said).encode() + b"\n")
        try:
            memory.export_session(record.agent_id, file, namespace)
        except SessionNotFound:
            # All of it is computed from the text.
            return


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.touch(mode=0o600)
        with draft.open("wb") as file:
            yield file
        draft.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}.") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def read_agent(path: Path, new_id: str | None) -> Iterator[tuple[AgentRecord, list[Message], BinaryIO]]:
    """An agent from a file, under its id or another one, and the file, which goes on with its session.

    Raises:
        InvalidRequest: the file cannot be read, or is no exported agent.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error}.") from error
    with file:
        try:
            record, messages = _read(file)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidRequest(f"{path} is no exported agent, or is damaged: {error}.") from error
        yield replace(record, agent_id=new_id or record.agent_id), messages, file


def has_session(file: BinaryIO) -> bool:
    """Whether the file goes on with a session."""
    here = file.tell()
    more = bool(file.read(1))
    file.seek(here)
    return more


def _read(file: BinaryIO) -> tuple[AgentRecord, list[Message]]:
    if file.readline(len(_FIRST)) != _FIRST:
        raise ValueError("it does not begin as one")
    said: dict[str, Any] = json.loads(file.readline(_MOST_LINE))
    messages = [from_json(text) for text in said.pop("messages")]
    record = AgentRecord(**said)
    texts = [record.agent_id, record.agent_type, record.system_prompt, record.model, record.template or ""]
    texts += [*record.metadata.keys(), *record.metadata.values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text in it is none")
    # Both tell how old it is here.
    now = time.time()
    return replace(record, created=now, last_access=now), messages
