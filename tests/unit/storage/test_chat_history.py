"""The text of a conversation in the terminal: whole, private, and never in the way of another one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from agent_memory_core import StoreError
from agent_memory_core.storage.chat_history import ChatHistory

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})
)


@settings(deadline=None)
@given(messages, messages, st.text(min_size=1), st.text(min_size=1))
def test_what_was_written_is_read_and_other_sessions_do_not_see_it(
    first: list[dict[str, str]], second: list[dict[str, str]], namespace: str, session: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mine = ChatHistory(Path(folder), namespace, session)
        others = [
            ChatHistory(Path(folder), namespace, session + "x"),
            ChatHistory(Path(folder), namespace + "x", session),
            ChatHistory(Path(folder), namespace + session, session),
        ]
        mine.write(first)
        mine.write(second)
        assert ChatHistory(Path(folder), namespace, session).read() == second
        assert [other.read() for other in others] == [[], [], []]
        mine.delete()
        mine.delete()
        assert mine.read() == []


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    ChatHistory(tmp_path, "default", "../../s").write([{"role": "user", "content": "private"}])
    (file,) = (tmp_path / "transcripts").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("text", ["", "{", "1", "[1]", "{}x", '{"role": 1}', '[{"role": "user"}]', "\udcff"])
def test_what_is_no_transcript_is_named(text: str, tmp_path: Path) -> None:
    transcript = ChatHistory(tmp_path, "default", "s")
    transcript.write([])
    (file,) = (tmp_path / "transcripts").iterdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=file.name):
        transcript.read()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "transcripts").write_text("")
    transcript = ChatHistory(tmp_path, "default", "s")
    with pytest.raises(StoreError, match="transcripts"):
        transcript.write([])
    with pytest.raises(StoreError, match="transcripts"):
        transcript.delete()
