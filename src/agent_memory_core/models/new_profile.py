"""Writes a new profile from a model's own files and live caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent_memory_core.errors import InvalidSetting
from agent_memory_core.models.description import inspect_caches
from agent_memory_core.models.folder import find_model
from agent_memory_core.models.loader import load_model
from agent_memory_core.models.profile import profile_directories, read_profile, shipped_directory
from agent_memory_core.models.profile_text import profile_text, stated_sampling, stated_thinking


@dataclass(frozen=True, slots=True)
class NewProfile:
    """A profile that was written."""

    path: Path
    contradictions: tuple[str, ...]
    """Where the model's config.json differs from its live caches."""
    is_found: bool
    """Whether it lies in a folder in which profiles are looked for."""


def write_profile(model: str, path: Path | None = None, *, replace: bool = False) -> NewProfile:
    """Load a model, write its profile, read it back and check it against the model.

    Without ``path`` it goes into the folder of the user's own profiles or, if there is none, the current one.

    Raises:
        InvalidSetting: the file is there and ``replace`` is not set, or it cannot be written.
        ModelError: the model cannot be loaded.
    """
    folder = find_model(model)
    local = Path(model).expanduser()
    model_id = local.resolve().name if local.is_dir() else model
    path = path or _default_path(model_id)
    if path.exists() and not replace:
        raise InvalidSetting(f"{path} is there already: give another --out, or --force to replace it.")
    loaded = load_model(model)
    spec, _ = inspect_caches(loaded)
    text = profile_text(model_id, spec, stated_sampling(folder), stated_thinking(loaded.tokenizer))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be written: {error}. Give another --out.") from error
    read_profile(path).check(spec)
    known = [directory.resolve() for directory in profile_directories()]
    return NewProfile(path, spec.contradictions, path.resolve().parent in known)


def _default_path(model_id: str) -> Path:
    own = [directory for directory in profile_directories() if directory != shipped_directory()]
    return (own[0] if own else Path()) / f"{model_id.rstrip('/').rsplit('/', 1)[-1].lower()}.toml"
