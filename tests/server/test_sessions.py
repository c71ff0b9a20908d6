"""Which conversation a request belongs to, by the names that clients send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent_memory_core import ChatRequest, Message
from agent_memory_core.server.sessions import (
    CLIENT_HEADERS,
    METADATA_NAMES,
    Thread,
    lane_of,
    session_by_content,
    session_of,
)

METADATA: dict[str, Any] = {name: f"metadata-{name}" for name in METADATA_NAMES}
METADATA["user_id"] = json.dumps({"device_id": "d", "session_id": "metadata-user_id"})
NAMES: list[tuple[str, tuple[str, ...]]] = [
    ("header x-session-id", ("headers", "x-session-id")),
    ("body session_id", ("body", "session_id")),
    *((f"header {name}", ("headers", name)) for name in CLIENT_HEADERS),
    ("body prompt_cache_key", ("body", "prompt_cache_key")),
    *((f"body metadata.{name}", ("body", "metadata", name)) for name in (*METADATA_NAMES, "user_id")),
    ("thread", ("thread",)),
]
"""Every name in the order in which they count, and where it stands."""


@pytest.mark.parametrize("first", range(len(NAMES)))
def test_the_first_name_that_is_there_counts(first: int) -> None:
    request: dict[str, Any] = {"headers": {}, "body": {"metadata": {}}, "thread": ""}
    for source, (*path, name) in NAMES[first:]:
        place = request
        for part in path:
            place = place[part]
        place[name] = METADATA.get(name, source) if "metadata" in path else source
    source, (*path, name) = NAMES[first]
    expected = f"metadata-{name}" if "metadata" in path else source
    new = Thread(request["thread"], is_new=True)
    assert session_of(request["headers"], request["body"], new) == (expected, source)


@pytest.mark.parametrize(("name", "source"), [("header x-session-id", "header x-session-id"), NAMES[2]])
def test_a_conversation_that_goes_on_has_its_session_unless_the_client_says_otherwise(
    name: str, source: Any
) -> None:
    headers = {name.removeprefix("header "): "said"}
    found = session_of(headers, {"prompt_cache_key": "key"}, Thread("held", is_new=False))
    assert found == (("said", name) if source == name else ("held", "thread"))


def test_a_session_without_a_name_is_that_of_its_agent_and_its_first_question() -> None:
    first = [Message("system", "Be brief."), Message("user", "Hi.")]
    later = [*first, Message("assistant", "Hello."), Message("user", "And?")]
    others = [[Message("system", "Be brief."), Message("user", "Hello.")], first[1:]]
    names = [session_by_content(ChatRequest(tuple(turn))).session_id for turn in (first, later, *others)]
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user": "ada", "safety_identifier": "ada", "metadata": {"user_id": "ada"}},
        {"metadata": {"user_id": '{"device_id": "d"}'}},
        {"metadata": {"user_id": "{not json"}},
        {"metadata": "text", "session_id": 5, "prompt_cache_key": ""},
    ],
)
def test_what_names_a_person_or_nothing_is_no_session(body: dict[str, Any]) -> None:
    assert session_of({}, body) == (None, "none")


def test_agents_are_told_apart_by_their_system_prompt_and_their_tools() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    lanes = {lane_of("Be brief.", []), lane_of("Be brief.", [tool]), lane_of("Be wordy.", [tool])}
    assert len(lanes) == 3
    changed = tool | {"function": {"name": "look", "description": "Now with words.", "parameters": {}}}
    assert lane_of("Be brief.", [changed]) in lanes
