"""The configuration of a `ModelManager`: which models there are, and how much memory they may take together."""

from __future__ import annotations

import json
import logging
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from agent_memory_core import EngineConfig, InvalidSetting
from agent_memory_core.manager.parameters import ModelType, by_our_names, native_of, near, sampling_of

log = logging.getLogger("agent_memory")

MIB = 2**20


class _Config(BaseModel):
    """Checked when made: a wrong value is one sentence of our own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers see one keyword for each field

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as wrong:
                raise InvalidSetting(_sentence(type(self), wrong)) from None


def _sentence(of: type[BaseModel], wrong: ValidationError) -> str:
    first = wrong.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or of.__name__
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        owner = ModelConfig if first["loc"][0] == "models" else of
        return f"unknown setting {place!r}: {near(name, owner.model_fields)}"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidSetting):
        return str(cause)
    return f"{place}={first['input']!r} is not valid: {first['msg']}."


class ModelConfig(_Config):
    """One model.

    Raises:
        InvalidSetting: a name is unknown, or a value cannot be used.
    """

    name: str = Field(min_length=1, max_length=200, description="By which it is asked for.")
    type: ModelType = Field(description="What runs it.")
    path: str = Field(
        min_length=1, description="A folder or hub id, a .gguf file, or the name of a model at an endpoint."
    )
    context_length: PositiveInt | None = Field(
        default=None, description="Most tokens of prompt and answer together; None is the model's own limit."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="How answers are sampled, and how the model is loaded; see the page.",
    )
    memory_priority: int = Field(default=3, ge=1, le=5, description="1 is unloaded last, 5 first.")
    max_idle_time: float | None = Field(
        default=300,
        description="Seconds without use after which it is unloaded; None or less than 0 is never.",
    )
    preload: bool = Field(default=False, description="Whether it is loaded before anybody asks for it.")
    pinned: bool = Field(
        default=False, description="Whether it is never unloaded to make room, nor when idle."
    )
    memory_mb: PositiveInt | None = Field(
        default=None, description="MiB that it takes, in place of an estimate from its files."
    )
    fallback: tuple[str, ...] = Field(default=(), description="Models to try where it cannot be loaded.")
    max_concurrency: PositiveInt | None = Field(
        default=None,
        description="Most calls at once; None is 1 for gguf and huggingface, unlimited for the others.",
    )

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        checked = by_our_names(self.type, self.parameters)
        object.__setattr__(self, "parameters", checked)
        if self.type == "mlx":
            EngineConfig(model=self.path, context_length=self.context_length, **self.native)
        return self

    @property
    def native(self) -> dict[str, Any]:
        """The parameters that say how the model is loaded or reached."""
        return native_of(self.type, self.parameters)

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters that say how answers are sampled, as fields of `SamplingParams`."""
        return sampling_of(self.parameters)

    @property
    def idle_limit(self) -> float | None:
        """Seconds without use after which the model is unloaded; None is never."""
        return self.max_idle_time if self.max_idle_time is not None and self.max_idle_time >= 0 else None

    @property
    def concurrency(self) -> int | None:
        """Most calls at once; None is unlimited."""
        if self.max_concurrency is None and self.type in ("gguf", "huggingface"):
            return 1
        return self.max_concurrency


class ManagerConfig(_Config):
    """The models of a process, and their memory.

    Raises:
        InvalidSetting: a name is unknown, a value cannot be used, or two of them do not go together.
    """

    max_memory_mb: PositiveInt | None = Field(
        default=None,
        description="MiB for all models together, with their KV; None is 70 % of the machine's memory, or of what "
        "Metal recommends.",
    )
    models: tuple[ModelConfig, ...] = Field(default=(), description="The models.")
    agents: dict[str, str] = Field(
        default_factory=dict,
        validation_alias=AliasChoices("agents", "agent_mapping"),
        description="The model of each agent, by names.",
    )
    default_model: str | None = Field(
        default=None, description="The model of agents that are not named; None is the first one."
    )
    load_timeout: float = Field(default=600, gt=0, description="Seconds that a caller waits for a model.")
    drain_timeout: float = Field(
        default=30, ge=0, description="Seconds that a forced unload waits for calls before it withdraws them."
    )
    fair_after: float = Field(
        default=10,
        ge=0,
        description="Seconds after which a model that is always in use makes way for another.",
    )
    min_loaded_time: float = Field(
        default=0,
        ge=0,
        description="Seconds that a model stays loaded before it may be unloaded to make room.",
    )
    strict_priority: bool = Field(
        default=False, description="Whether a model makes room only for those that are at least as important."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _models_by_place(cls, models: Any) -> Any:
        """Made one by one, so that the error of one says which it is."""
        if not isinstance(models, (list, tuple)):
            return models
        return [ModelConfig(**model) if isinstance(model, Mapping) else model for model in models]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidSetting(f"two models are called {twice[0]!r}: give each a name of its own.")
        uses = {f"agents[{agent!r}]": name for agent, name in self.agents.items()}
        uses |= {"default_model": self.default_model} if self.default_model is not None else {}
        uses |= {f"fallback of {m.name!r}": name for m in self.models for name in m.fallback}
        for place, name in uses.items():
            if name not in names:
                raise InvalidSetting(
                    f"{place} names the model {name!r}, which is not there: {near(name, names)}"
                )
        check_fallbacks({model.name: model.fallback for model in self.models})
        check_engines(self.models)
        return self

    def replaced(self, **values: Any) -> Self:
        """The same with other values, checked anew.

        Raises:
            InvalidSetting: they cannot be used, or do not go together.
        """
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a .json or .toml file. A relative path of a model counts from the working directory where it exists
        there, and else from the folder of the file.

        Raises:
            InvalidSetting: the file cannot be read, or what it says cannot be used.
        """
        file = Path(path).expanduser()
        try:
            text = file.read_text(encoding="utf-8")
            values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError) as error:
            raise InvalidSetting(f"the configuration {str(file)!r} cannot be read: {error}.") from error
        if not isinstance(values, dict):
            raise InvalidSetting(f"the configuration {str(file)!r} is not valid: it must be an object.")
        models = values.get("models", [])
        if isinstance(models, list):
            values["models"] = [_placed(model, file.parent) for model in models]
        return cls(**values)


def _placed(model: Any, folder: Path) -> Any:
    """A model's values with its path absolute, where it is a file or folder."""
    path = model.get("path") if isinstance(model, dict) else None
    if not isinstance(path, str) or model.get("type") == "openai":
        return model
    if "/" not in path and not path.endswith(".gguf"):
        return model
    for base in (Path.cwd(), folder):
        if (found := base / Path(path).expanduser()).exists():
            return {**model, "path": str(found.resolve())}
    return model


def check_fallbacks(fallbacks: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse models that stand in for each other in a circle.

    Raises:
        InvalidSetting: there is one.
    """

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise InvalidSetting(f"the fallbacks go in a circle: {' -> '.join((*above, name))}.")
        for other in fallbacks.get(name, ()):
            visit(other, (*above, name))

    for name in fallbacks:
        visit(name, ())


def check_engines(models: tuple[ModelConfig, ...]) -> None:
    """Refuse two models that would be one engine: unloading one of them would unload the other.

    Raises:
        InvalidSetting: there are two.
    """
    seen: dict[EngineConfig, str] = {}
    for model in models:
        if model.type != "mlx":
            continue
        engine = EngineConfig(model=model.path, context_length=model.context_length, **model.native)
        if engine in seen:
            raise InvalidSetting(
                f"the models {seen[engine]!r} and {model.name!r} are the same one with the same settings: keep one, "
                "and name it for several agents under agents."
            )
        seen[engine] = model.name
