"""Types of agents: TOML files that give a system prompt, and how such an agent answers.

    name = "technical"
    description = "Finds faults in programs."
    system_prompt = "You are a technical specialist for {subject}."

    [sampling]
    temperature = 0.2

    [metadata]
    subject = "software"

Words in braces are filled from the agent's metadata, and where it says nothing, from the template's.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from agent_memory_core import InvalidRequest, InvalidSetting, SamplingParams

_KEYS = {"name", "description", "system_prompt", "sampling", "metadata"}


@dataclass(frozen=True, slots=True)
class AgentTemplate:
    """One type of agents."""

    name: str
    description: str
    system_prompt: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`; what a turn says itself goes before them."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def filled(self, metadata: Mapping[str, str]) -> str:
        """The system prompt of one agent.

        Raises:
            InvalidRequest: a word in braces is in no metadata.
        """
        said = {**self.metadata, **metadata}
        missing = sorted(set(re.findall(r"\{(\w+)\}", self.system_prompt)) - said.keys())
        if missing:
            raise InvalidRequest(
                f"the template {self.name!r} needs {', '.join(missing)}: give metadata with these names."
            )
        return re.sub(r"\{(\w+)\}", lambda found: said[found[1]], self.system_prompt)


def read_templates(folder: Path | None = None) -> dict[str, AgentTemplate]:
    """The templates that come with the package, and those of a folder, which go before them; by name.

    Raises:
        InvalidSetting: the folder or a file in it cannot be read, or is no template.
    """
    places: list[Traversable] = [resources.files(__package__).joinpath("templates")]
    if folder is not None:
        if not folder.is_dir():
            raise InvalidSetting(f"templates={str(folder)!r} is not a folder.")
        places.append(folder)
    files = [file for place in places for file in place.iterdir() if file.name.endswith(".toml")]
    return {template.name: template for template in map(_read, files)}


def find_template(templates: Mapping[str, AgentTemplate], name: str) -> AgentTemplate:
    """The template of a type.

    Raises:
        InvalidRequest: there is none.
    """
    if name not in templates:
        raise InvalidRequest(
            f"there is no template {name!r}: give a system_prompt, or one of {', '.join(sorted(templates))}."
        )
    return templates[name]


def _read(file: Traversable) -> AgentTemplate:
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"the template {file.name} cannot be read: {error}.") from error
    unknown = said.keys() - _KEYS
    lacking = {"name", "system_prompt"} - said.keys()
    if unknown or lacking:
        wrong = f"has the unknown key {min(unknown)!r}" if unknown else f"has no {min(lacking)!r}"
        raise InvalidSetting(f"the template {file.name} {wrong}: its keys are {', '.join(sorted(_KEYS))}.")
    try:
        SamplingParams(**said.get("sampling", {}))
    except (TypeError, ValueError) as error:
        raise InvalidSetting(
            f"the template {file.name} has a [sampling] that is not valid: {error}"
        ) from error
    metadata = {name: str(value) for name, value in said.get("metadata", {}).items()}
    return AgentTemplate(
        name=said["name"],
        description=said.get("description", ""),
        system_prompt=said["system_prompt"],
        sampling=said.get("sampling", {}),
        metadata=metadata,
    )
