"""An answer in pieces, as the engine gives it to any adapter."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from agent_memory_core import (
    ChatResult,
    Delta,
    InvalidToolCall,
    ToolCall,
    TurnReport,
    Usage,
)

REPORT = TurnReport(
    finish_reason="stop",
    usage=Usage(prompt_tokens=20, completion_tokens=5, cache_read=16, reasoning_tokens=2),
    hit_tier="warm",
    miss_reason="diverged",
    restore_seconds=0.0125,
    time_to_first_token=0.25,
    total_seconds=1.0,
    session_id="s",
    branch_id=3,
    model="tiny-chat",
    persisted=True,
)
MEASURED = {
    "finish_reason": "stop",
    "hit_tier": "warm",
    "miss_reason": "diverged",
    "restore_ms": 12.5,
    "ttft_ms": 250.0,
    "session_id": "s",
    "branch_id": 3,
    "persisted": True,
    "save_error": None,
    "lane": "",
    "miss": None,
}
"""`REPORT` as every framework's metadata has it."""

CALLS = (ToolCall("add", {"b": 2, "a": "ä"}, "c1"), ToolCall("clock", {}, "c2"))
CUT_OFF = InvalidToolCall('{"name": "add", "arguments": {"a": 1', "the answer ended inside a call")
END = Delta(report=REPORT)
DELTAS = [
    Delta(reasoning="let me "),
    Delta(reasoning="see"),
    Delta(text="I will "),
    Delta(text="add", token_ids=(1,)),
    Delta(tool_calls=(CALLS[0],)),
    Delta(tool_calls=(CALLS[1],)),
]
"""Reasoning, text and two calls; without an `END`."""


def whole(deltas: Sequence[Delta]) -> ChatResult:
    """The answer that ``deltas`` are the pieces of."""
    report = deltas[-1].report
    assert report is not None
    return ChatResult(
        text="".join(d.text for d in deltas),
        reasoning="".join(d.reasoning for d in deltas),
        tool_calls=tuple(c for d in deltas for c in d.tool_calls),
        invalid_tool_calls=tuple(c for d in deltas for c in d.invalid_tool_calls),
        token_ids=(),
        report=report,
    )


_texts = st.text(st.characters(blacklist_categories=["Cs"]))
_calls = st.builds(
    ToolCall,
    st.text(st.characters(categories=["L"]), min_size=1),
    st.dictionaries(_texts, st.one_of(_texts, st.integers(), st.booleans(), st.lists(_texts, max_size=2))),
    st.uuids().map(str),
)
ANSWERS = st.lists(
    st.one_of(_texts.map(lambda text: Delta(text=text)), _calls.map(lambda call: Delta(tool_calls=(call,))))
).map(lambda deltas: [*deltas, END])
"""Answers of any text and any calls, in pieces."""
