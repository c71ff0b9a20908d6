"""The folder of a model: where it is, and what its config.json states. Nothing here imports MLX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_memory_core.backend import import_mlx_lm
from agent_memory_core.config import EMBEDDED_MODELS, as_model_name, looks_like_path
from agent_memory_core.errors import ModelNotFound

DEFAULT_CONTEXT = 32768
"""Tokens, where neither a model's config nor its user states a limit."""


def find_model(model: str) -> Path:
    """Return the folder of an embedded name, a folder, or a hub id (which may download it).

    Raises:
        ModelNotFound: there is none, or the hub cannot be reached.
    """
    folder = find_local_model(model)
    return folder if folder is not None else _hub_folder(model)


def find_local_model(model: str) -> Path | None:
    """Return the folder of an embedded name or a folder; None for what can only be a hub id. Takes no time.

    Raises:
        ModelNotFound: it is a path, and nothing usable is there.
    """
    folder = _local_folder(model)
    if folder is not None and folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"the folder {model!r} has no config.json: give a folder in MLX or hub format."
            )
        return folder
    if looks_like_path(model):
        raise ModelNotFound(f"there is no folder {model!r}: check the path.")
    return None


def configured_context(model: str, context_length: int | None = None) -> int | None:
    """The context length of a model in tokens, without loading it; None for a hub id, whose files may not be here."""
    folder = _local_folder(model)
    if folder is None:
        return None
    try:
        return stated_context(json.loads((folder / "config.json").read_text()), context_length)
    except (OSError, ValueError):
        return None


_THOUGHTS = ("<think>", "<longcat_think>", "<|think:start|>", "<|channel>thought")
"""Marks that begin a thought, as mlx-lm knows them."""


def configured_reasoning(model: str) -> bool | None:
    """Whether a model's files have marks for thoughts; None for a hub id, whose files may not be here."""
    folder = _local_folder(model)
    if folder is None:
        return None
    files = [folder / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    return any(mark in text for mark in _THOUGHTS)


def stated_context(config: Mapping[str, Any], otherwise: int | None) -> int:
    """The context length that a model's config states, in tokens, or else ``otherwise``, or else a default."""
    for part in (config, config.get("text_config") or {}):
        length = part.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return length
    return otherwise or DEFAULT_CONTEXT


def _local_folder(model: str) -> Path | None:
    """The folder of an embedded or local model, which may be missing; None for what can only be a hub id."""
    if model in EMBEDDED_MODELS:
        return Path(__file__).parents[1] / EMBEDDED_MODELS[model]
    location = as_model_name(model).location
    return Path(location) if location != model or Path(location).is_absolute() else None


def _hub_folder(model: str) -> Path:
    # Imported where it is needed: this loads MLX and the tokenizers.
    import_mlx_lm()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from mlx_lm.utils import _download

    try:
        return Path(_download(model))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"no embedded model ({', '.join(EMBEDDED_MODELS)}), folder or reachable hub model is called {model!r}: "
            f"{error.__class__.__name__}. Check the name, or download it first and give its folder."
        ) from error


def weights_on_disk(model: str) -> int | None:
    """Bytes of a model's weight files, without loading it; None for a hub id, whose files may not be here."""
    folder = _local_folder(model)
    if folder is None or not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
