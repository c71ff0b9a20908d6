"""OpenAI's list of the tools that may be called this time, in the two forms in which it comes.

Chat completions hold the list one level deeper than responses, and name a tool in ``function``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, model_validator

from agent_memory_core.server.errors import INVALID, ApiError


class AllowedTool(BaseModel):
    """A tool that may be called."""

    name: str
    namespace: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        function = value.get("function") if isinstance(value, Mapping) else None
        return function if isinstance(function, Mapping) else value

    @property
    def full_name(self) -> str:
        """The name by which the model knows it."""
        return full_name(self.name, self.namespace)


class AllowedTools(BaseModel):
    """The tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[AllowedTool]

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        inner = value.get("allowed_tools") if isinstance(value, Mapping) else None
        return inner if isinstance(inner, Mapping) else value


def full_name(name: str, namespace: object) -> str:
    """The name by which the model knows a tool, which has one list of them only."""
    return f"{namespace}__{name}" if namespace else name


def allowed_tools(tools: list[dict[str, Any]], choice: object) -> tuple[list[dict[str, Any]], object]:
    """The tools that the model is told of, and the choice among them.

    Raises:
        ApiError: the choice is a list of tools that cannot be read.
    """
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return tools, choice
    try:
        allowed = AllowedTools.model_validate(choice)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        place = ".".join(["tool_choice", *map(str, first["loc"])])
        raise ApiError(INVALID, f"{place}: {first['msg']}.", param="tool_choice") from None
    names = {tool.full_name for tool in allowed.tools}
    return [tool for tool in tools if tool["function"]["name"] in names], allowed.mode
