"""Agents as prompt caches of mlx-lm: one safetensors file an agent, with words about it in the header.

Only the header is read. The tensors are of no use here: the file does not say of which tokens they are, and its layout
changes between releases of mlx-lm. The words lie in ``__metadata__`` as a flattened list, in which the caller's own are
the second entry until mlx-lm 0.30 and the first one since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_memory_core import InvalidRequest, Message
from agent_memory_core.agents.contexts import AgentContext

_MOST_HEADER = 100 * 2**20
_PLACES = ("0.", "1.")


@dataclass(frozen=True, slots=True)
class PromptCacheAgent:
    """What the header of a prompt cache says of its agent."""

    agent_id: str
    agent_type: str
    system_prompt: str = field(repr=False)
    messages: tuple[Message, ...] = field(repr=False)
    """What was said, where somebody wrote it down; most files do not have it."""


def prompt_caches(path: Path) -> list[Path]:
    """The prompt caches in a folder, or the one file.

    Raises:
        InvalidRequest: there is none.
    """
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found:
        raise InvalidRequest(f"there is no .safetensors file in {path}.")
    return found


def read_prompt_cache(path: Path) -> PromptCacheAgent:
    """The agent of one file.

    Raises:
        InvalidRequest: it cannot be read, is no safetensors file, or says of no agent.
    """
    try:
        words = _words(path)
        place = next((place for place in _PLACES if f"{place}agent_id" in words), None)
        if place is None:
            raise ValueError("it names no agent_id")
        own = {name.removeprefix(place): text for name, text in words.items() if name.startswith(place)}
        said = json.loads(own.get("conversation_history") or "[]")
        return PromptCacheAgent(
            agent_id=own["agent_id"],
            agent_type=own.get("agent_type") or "imported",
            system_prompt=own.get("system_prompt", ""),
            messages=tuple(Message(each["role"], each["content"]) for each in said),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} is not the prompt cache of an agent: {error}.") from error


def to_words(context: AgentContext) -> dict[str, str]:
    """The metadata of an agent's file."""
    return {
        "agent_id": context.agent_id,
        "agent_type": context.agent_type,
        "system_prompt": context.system_prompt,
        "cache_tokens": str(context.cache_tokens),
        "conversation_history": json.dumps(context.conversation_history),
    }


def _words(path: Path) -> Mapping[str, str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            raise ValueError("it does not begin with the header of a safetensors file")
        header: Any = json.loads(file.read(length))
    words = header["__metadata__"]
    if not all(isinstance(text, str) for text in words.values()):
        raise ValueError("its metadata is not text")
    return dict(words)
