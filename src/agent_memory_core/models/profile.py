"""Model profiles: what is known about one model, in a TOML file that is checked against the model itself.

A profile is optional; a model without one runs on the defaults. Every key is used or refused by name:

    [model]       model_id, and the geometry that the loaded model must confirm: a number that all layers have,
                  or a list of those that occur; [model.layers.<type>] is about the layers of one type only
    [inference]   sampling defaults, and whether the chat template can think
    [optimal]     settings of the engine that suit the model
    [thresholds]  limits of the engine that suit the model
    [benchmark]   what was measured, and on which machine; nothing reads it
"""

from __future__ import annotations

import logging
import os
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from agent_memory_core.config import (
    EngineConfig,
    SamplingParams,
    absolute,
    as_model_name,
    check_setting,
    may_be_none,
    profile_keys,
)
from agent_memory_core.environment import (
    ALWAYS_ON,
    RETIRED,
    from_environment,
    resolve_sampling,
    resolve_settings,
)
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.models.cache_spec import LAYER_TYPES, ModelCacheSpec

log = logging.getLogger("agent_memory")

CONFIGS_VARIABLE = "AGENT_MEMORY_MODEL_CONFIGS"
"""Names a directory of profiles that is searched before the shipped ones."""

_GEOMETRY = ("n_layers", "n_kv_heads", "head_dim", "v_head_dim", "sliding_window")

_OF_A_TYPE = ("count", "n_kv_heads", "head_dim", "v_head_dim", "sliding_window")
"""Keys of a [model.layers.<type>] table."""

_SAMPLING = profile_keys(SamplingParams, "inference")

_THINKING = ("supports_thinking", "extended_thinking")

_SETTINGS: Mapping[str, Mapping[str, str]] = {
    section: profile_keys(EngineConfig, section) for section in ("optimal", "thresholds")
}
"""Keys of a section, and the field of the engine's configuration that each one sets."""

_REFUSED: Mapping[str, str] = {
    **RETIRED,
    "long_context_threshold": "prompts of every length are scheduled in the same way: set context_length",
    "high_batch_threshold": "the batch is bounded by max_batch_size alone",
    "memory_pressure_mb": "memory is bounded before it is used: set memory_budget_mb",
    "min_cache_benefit_ratio": "whether a restore pays is decided by its size alone",
}


Geometry = Mapping[str, int | tuple[int, ...]]
"""Keys of a model's or a layer type's geometry, with what all its layers have or with all that occurs."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One model's profile, read and checked for itself."""

    name: str
    """The name of its file, without the ending."""
    model_id: str
    """The model that it describes."""
    geometry: Geometry = field(default_factory=dict)
    """What all layers have, or a list of what occurs."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig`, for `resolve_settings`."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`, for `resolve_sampling`."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the chat template."""
    benchmark: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and where."""
    layers: Mapping[str, Geometry] = field(default_factory=dict)
    """The geometry of the layers of one type, by type."""
    path: Path | None = field(default=None, compare=False)
    """The file that was read."""

    @property
    def is_shipped(self) -> bool:
        """Whether it came with this package."""
        return self.path is not None and self.path.parent == shipped_directory()

    def check(self, spec: ModelCacheSpec) -> None:
        """Compare the profile with the loaded model.

        Raises:
            InvalidSetting: they disagree, so the profile is of another model.
        """
        for sentence in spec.contradictions:
            log.info("profile %s: %s.", self.name, sentence)
        self._compare(self.geometry, spec, None)
        for layer_type, geometry in self.layers.items():
            self._compare(geometry, spec, layer_type)
        limit, asked = spec.context_length, self.settings.get("context_length")
        if limit is not None and asked is not None and asked > limit:
            raise InvalidSetting(
                f"profile {self.name}: context_length = {asked}, but the model's limit is {limit}."
            )

    def _compare(self, geometry: Geometry, spec: ModelCacheSpec, layer_type: str | None) -> None:
        stated_keys = (
            {**self.geometry, **geometry} if layer_type else set(geometry).union(*self.layers.values())
        )
        widths_alone = "head_dim" in geometry and "v_head_dim" not in stated_keys
        implied = {"v_head_dim": geometry["head_dim"]} if widths_alone else {}
        for key, stated in {**geometry, **implied}.items():
            found = spec.values_of(key, layer_type)
            if set(stated if isinstance(stated, tuple) else (stated,)) == found:
                continue
            where = f"layers.{layer_type}.{key}" if layer_type else key
            why = "" if key in geometry else " (head_dim alone means that values are as wide as keys)"
            raise InvalidSetting(
                f"profile {self.name}: {where} = {_listed(stated)}{why}, but the loaded model has "
                f"{_listed(sorted(found))}: `agent-memory models new` writes a profile of this model; put it into "
                f"{CONFIGS_VARIABLE}{f', or correct {self.path}' if self.path else ''}."
            )


def _listed(values: int | Iterable[int]) -> str:
    values = [values] if isinstance(values, int) else list(values)
    return " and ".join(map(str, values)) or "None"


def find_profile(model: str, environ: Mapping[str, str] | None = None) -> Profile | None:
    """The profile of ``model`` (an embedded name, a folder or a hub id), or None where there is none.

    It is matched by ``model_id``, by the last part of either path in lower case, or by the file's own name. It is
    read again only when a file of its folder has changed.

    Raises:
        InvalidSetting: the profile cannot be read, or a key of it is unknown.
    """
    name = as_model_name(model)
    for directory in profile_directories(environ):
        files = _files(directory, _last_change(directory))
        found = _find(name, name.location, tuple((path, _last_change(path)) for path in files))
        if found is not None:
            return found
    return None


@lru_cache(maxsize=16)
def _files(directory: Path, changed: int) -> tuple[Path, ...]:
    """The profiles of a folder; ``changed`` makes a changed folder another one."""
    return tuple(sorted(directory.glob("[!.]*.toml")))


@lru_cache(maxsize=128)
def _find(model: str, location: str, files: tuple[tuple[Path, int], ...]) -> Profile | None:
    """The profile of ``model`` among ``files``, each with the time of its last change."""
    for path, changed in files:
        document = _read(path, changed)
        if _matches({model, location}, path.stem, document):
            return _profile(path, document)
    return None


_CLOCK_TICK = 2 * 10**9
"""Nanoseconds within which two changes of a file may have the same time, on the coarsest file systems."""


def _last_change(path: Path) -> int:
    """A number that is another one after a change of ``path``; in nanoseconds, 0 where there is nothing."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return 0
    now = time.time_ns()
    # What was changed just now may change again without a later time: it is taken as changed whenever it is asked for.
    return changed if now - changed > _CLOCK_TICK else now


def settings_for(explicit: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> EngineConfig:
    """`resolve_settings` with the profile of whichever model the other sources choose.

    Raises:
        InvalidSetting: a name or value of any source cannot be used.
    """
    model = {**from_environment(environ), **explicit}.get("model", EngineConfig.model_fields["model"].default)
    profile = find_profile(os.fspath(model), environ) if isinstance(model, (str, os.PathLike)) else None
    return resolve_settings(explicit, environ, profile.settings if profile else None)


def sampling_for(
    model: str, explicit: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> SamplingParams:
    """`resolve_sampling` with the profile of ``model``.

    Raises:
        InvalidSetting: a name is unknown, or a variable or profile value cannot be used.
        InvalidRequest: an explicit value is outside its range.
    """
    profile = find_profile(model, environ)
    return resolve_sampling(explicit, environ, profile.sampling if profile else None)


def list_profiles() -> tuple[list[Profile], list[InvalidSetting]]:
    """All profiles, in the order in which they are searched, and an error for each file that cannot be read."""
    profiles, errors = [], []
    for directory in profile_directories():
        for path in sorted(directory.glob("[!.]*.toml")):
            try:
                profiles.append(read_profile(path))
            except InvalidSetting as error:
                errors.append(error)
    return profiles, errors


def read_profile(path: Path) -> Profile:
    """Read one profile.

    Raises:
        InvalidSetting: the file cannot be read, or a key of it is unknown or out of range.
    """
    return _profile(path, _read(path, _last_change(path)))


def shipped_directory() -> Path:
    """Where the profiles of this distribution are: in the installed package, or beside ``src``."""
    return _shipped_directory()


@cache
def _shipped_directory() -> Path:
    here = Path(__file__).resolve().parents[1]
    installed = here / "model_configs"
    return installed if installed.is_dir() else here.parents[1] / "model_configs"


def profile_directories(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Where profiles are looked for, first to last.

    Raises:
        InvalidSetting: the variable names what is not a directory.
    """
    environ = os.environ if environ is None else environ
    shipped = [shipped_directory()]
    if CONFIGS_VARIABLE not in environ:
        return shipped
    own = _own_directory(environ[CONFIGS_VARIABLE])
    if not own.is_dir():
        raise InvalidSetting(
            f"{CONFIGS_VARIABLE}={environ[CONFIGS_VARIABLE]!r} is not a directory: unset or create it."
        )
    return [own, *shipped]


@cache
def _own_directory(text: str) -> Path:
    """The folder that the variable names. A relative one is where it was when it was first asked for."""
    return absolute(text)


def _read(path: Path, changed: int) -> Mapping[str, Any]:
    try:
        return _parsed(path, changed)
    except (OSError, ValueError) as wrong:
        raise InvalidSetting(f"{path}: not a readable TOML file: {wrong}.") from wrong


@lru_cache(maxsize=128)
def _parsed(path: Path, changed: int) -> Mapping[str, Any]:
    """The document of a file; ``changed`` makes a changed file another one."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _last_part(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1].lower()


def _matches(spellings: Iterable[str], stem: str, document: Mapping[str, Any]) -> bool:
    section = document.get("model")
    model_id = section.get("model_id") if isinstance(section, dict) else None
    names = {stem} | ({_last_part(model_id)} if isinstance(model_id, str) else set())
    return any(model == model_id or _last_part(model) in names for model in spellings)


_KNOWN: Mapping[str, frozenset[str]] = {
    "model": frozenset({"model_id", "layers", *_GEOMETRY}),
    "inference": frozenset({*_SAMPLING, *_THINKING}),
    **{section: frozenset(keys) for section, keys in _SETTINGS.items()},
}


def _profile(path: Path, document: Mapping[str, Any]) -> Profile:
    sections = (*_KNOWN, "benchmark")
    for name, section in document.items():
        if name not in sections or not isinstance(section, dict):
            choice = ", ".join(sections)
            raise InvalidSetting(f"{path}: {name} is not a known section: choose from {choice}.")
    model = _section(path, document, "model")
    inference = _section(path, document, "inference")
    return Profile(
        name=path.stem,
        model_id=_model_id(path, model),
        geometry=_geometry(path, "model", {key: model[key] for key in _GEOMETRY if key in model}),
        settings=_settings(path, document),
        sampling=_sampling(path, inference),
        template_kwargs=_template_kwargs(path, inference),
        benchmark=document.get("benchmark", {}),
        layers=_layers(path, model.get("layers", {})),
        path=path,
    )


def _where(path: Path, section: str, key: str) -> str:
    return f"{path}, [{section}] {key}"


def _section(path: Path, document: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The known keys of one section; a key that could have no effect is refused by name."""
    keys = {}
    for key, value in document.get(section, {}).items():
        where = _where(path, section, key)
        if key in _KNOWN[section]:
            keys[key] = value
        elif key in _REFUSED:
            raise InvalidSetting(f"{where} has no effect here: {_REFUSED[key]}. Delete it.")
        elif key not in ALWAYS_ON:
            choice = ", ".join(sorted(_KNOWN[section]))
            raise InvalidSetting(f"{where} is not a known key: choose from {choice}.")
        elif value is not True:
            raise InvalidSetting(f"{where} = {value!r} is not possible: {ALWAYS_ON[key]}. Delete it.")
    return keys


def _model_id(path: Path, model: Mapping[str, Any]) -> str:
    model_id = model.get("model_id")
    if not isinstance(model_id, str) or not model_id:
        where = _where(path, "model", "model_id")
        raise InvalidSetting(f"{where} = {model_id!r} is not valid: say which model this is a profile of.")
    return model_id


def _geometry(path: Path, section: str, stated: Mapping[str, Any]) -> Geometry:
    geometry: dict[str, int | tuple[int, ...]] = {}
    for key, value in stated.items():
        several = isinstance(value, list) and key not in ("n_layers", "count") and len(value) > 1
        values = value if several else [value]
        if any(type(one) is not int or one < 1 for one in values):
            where = _where(path, section, key)
            raise InvalidSetting(
                f"{where} = {value!r} is not valid: a whole number of at least 1, or where layers differ "
                "the list of all that occur."
            )
        geometry[key] = tuple(values) if several else value
    return geometry


def _layers(path: Path, tables: Any) -> dict[str, Geometry]:
    if not isinstance(tables, dict):
        raise InvalidSetting(
            f"{path}, [model] layers = {tables!r} is not valid: write [model.layers.global]."
        )
    layers = {}
    for layer_type, stated in tables.items():
        section = f"model.layers.{layer_type}"
        if layer_type not in LAYER_TYPES or not isinstance(stated, dict):
            choice = ", ".join(LAYER_TYPES)
            raise InvalidSetting(f"{path}, [{section}] is not a known type of layer: choose from {choice}.")
        for key in stated:
            if key not in _OF_A_TYPE:
                choice = ", ".join(_OF_A_TYPE)
                where = _where(path, section, key)
                raise InvalidSetting(f"{where} is not a known key: choose from {choice}.")
        layers[layer_type] = _geometry(path, section, stated)
    return layers


def _sampling(path: Path, inference: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {key: value for key, value in inference.items() if key in _SAMPLING}
    for key, value in sampling.items():
        check_setting(SamplingParams, key, value, _where(path, "inference", key))
    return sampling


def _template_kwargs(path: Path, inference: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template's argument about thinking; none if the model cannot think."""
    can_think, thinks = (inference.get(key, False) for key in _THINKING)
    if not isinstance(can_think, bool) or not isinstance(thinks, bool) or thinks > can_think:
        raise InvalidSetting(
            f"{path}, [inference]: supports_thinking = {can_think!r} with extended_thinking = {thinks!r} "
            "is not valid: both are true or false, and only a model that supports it can think."
        )
    return {"enable_thinking": thinks} if can_think else {}


def _settings(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for section, names in _SETTINGS.items():
        for key, stated in _section(path, document, section).items():
            name, where = names[key], _where(path, section, key)
            # TOML has no null.
            value = None if stated == "none" and may_be_none(EngineConfig, name) else stated
            check_setting(EngineConfig, name, value, where)
            if settings.setdefault(name, value) != value:
                raise InvalidSetting(f"{where}: {name} is already {settings[name]!r}. Delete one of the two.")
    return settings
