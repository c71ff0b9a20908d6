"""Names of sessions and namespaces: what can be stored and shown, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import MAX_NAME, validate_namespace, validate_session_id


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=MAX_NAME))
def test_any_text_without_control_characters_can_be_a_name(name: str) -> None:
    assert validate_session_id(name) == validate_namespace(name) == name


@pytest.mark.parametrize("unfit", ["", "x" * 513, "a\nb", "a\0b", "\x7f", "\x85", "\ud800", 7, None])
def test_what_could_not_be_stored_or_shown_is_refused(unfit: str) -> None:
    with pytest.raises(InvalidRequest, match="session id"):
        validate_session_id(unfit)
    with pytest.raises(InvalidRequest, match="namespace"):
        validate_namespace(unfit)
