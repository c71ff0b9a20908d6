"""Model id or folder to weights, tokenizer and fingerprint.

The fingerprint is what makes two models of equal geometry strangers: a sha256 over the architecture config,
the adapter, the tokenizer's files and the weights (all bytes of small files; headers, sizes and evenly spaced
samples of large ones). The chat template is left out: it decides which tokens are asked for, and tokens decide
what is reused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download, load

from agent_memory_core.errors import ModelError, ModelNotFound

log = logging.getLogger("agent_memory")

EMBEDDED = {"tiny-chat": "tiny_chat"}
"""Models shipped inside the package: name to folder."""

WHOLE_FILE = 256 * 2**20
"""Weight files up to this many bytes are hashed whole."""

SAMPLES, SAMPLE_BYTES = 1024, 16 * 1024
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_DEFAULT_CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. ``context_length`` is in tokens; ``fingerprint`` is a sha256 hex digest."""

    name: str
    model: Any
    tokenizer: TokenizerWrapper
    fingerprint: str
    context_length: int
    config: dict[str, Any]


def find_model(model: str) -> Path:
    """Return the folder of an embedded name, a folder, or a hub id (which may download it).

    Raises:
        ModelNotFound: there is none, or the hub cannot be reached.
    """
    if model in EMBEDDED:
        return Path(__file__).parents[1] / EMBEDDED[model]
    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"the folder {model!r} has no config.json: give a folder in MLX or hub format."
            )
        return folder
    looks_like_path = model.startswith((".", "~", "/")) or model.count("/") > 1
    if looks_like_path:
        raise ModelNotFound(f"there is no folder {model!r}: check the path.")
    try:
        return Path(_download(model))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"no embedded model ({', '.join(EMBEDDED)}), folder or reachable hub model is called {model!r}: "
            f"{error.__class__.__name__}. Check the name, or download it first and give its folder."
        ) from error


def load_model(model: str, adapter_path: str | None = None, context_length: int | None = None) -> LoadedModel:
    """Load weights and tokenizer, evaluated, on the calling thread.

    ``context_length`` is what the model can take where its config states no limit.

    Raises:
        ModelNotFound: there is no such model or adapter.
        ModelError: the folder is there, but mlx-lm cannot load it.
    """
    folder = find_model(model)
    if adapter_path is not None and not Path(adapter_path).is_dir():
        raise ModelNotFound(f"there is no adapter folder {adapter_path!r}: check adapter_path.")
    _without_compiler()
    try:
        network, tokenizer, *rest = load(str(folder), adapter_path=adapter_path, return_config=True)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        raise ModelError(f"mlx-lm cannot load {str(folder)!r}: {error}") from error
    config: dict[str, Any] = rest[0]
    return LoadedModel(
        name=model,
        model=network,
        tokenizer=tokenizer,
        fingerprint=fingerprint(folder, adapter_path),
        context_length=_context_length(config, context_length),
        config=config,
    )


def configured_context(model: str, context_length: int | None = None) -> int | None:
    """The context length of `load_model`, in tokens, without loading; None for a model that is not here."""
    folder = Path(__file__).parents[1] / EMBEDDED[model] if model in EMBEDDED else Path(model).expanduser()
    try:
        return _context_length(json.loads((folder / "config.json").read_text()), context_length)
    except (OSError, ValueError):
        return None


def fingerprint(folder: Path, adapter_path: str | None = None) -> str:
    """Hash everything that makes the KV of a token what it is, see the module's docstring."""
    digest = hashlib.sha256(b"agent-memory model 1")
    _add_file(digest, folder / "config.json", whole=True)
    for file in sorted(folder.glob("*.safetensors")):
        _add_file(digest, file)
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            _add_file(digest, folder / name, whole=True)
    if adapter_path is not None:
        for file in sorted(Path(adapter_path).glob("adapter*")):
            _add_file(digest, file)
    return digest.hexdigest()


def _add_file(digest: Any, file: Path, *, whole: bool = False) -> None:
    size = file.stat().st_size
    digest.update(json.dumps([file.name, size]).encode())
    with file.open("rb") as data:
        for start, length in _spans(size, whole=whole or size <= WHOLE_FILE):
            data.seek(start)
            digest.update(data.read(length))


def _spans(size: int, *, whole: bool) -> Iterable[tuple[int, int]]:
    """Byte spans of a file to hash: the head with the safetensors header, then evenly spaced samples."""
    if whole:
        return [(0, size)]
    step = size // SAMPLES
    return [
        (0, 2**20),
        *((i * step, SAMPLE_BYTES) for i in range(SAMPLES)),
        (size - SAMPLE_BYTES, SAMPLE_BYTES),
    ]


def _context_length(config: dict[str, Any], otherwise: int | None) -> int:
    for part in (config, config.get("text_config") or {}):
        length = part.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return length
    return otherwise or _DEFAULT_CONTEXT


def _without_compiler() -> None:
    """On a CPU MLX compiles fused kernels with g++ at run time; without one it must not try."""
    if (
        platform.system() == "Linux"
        and mx.default_device() == mx.Device(mx.cpu)
        and shutil.which("g++") is None
    ):
        mx.disable_compile()
        global _warned
        if not _warned:
            _warned = True
            log.warning("no g++ on this machine: MLX runs uncompiled on the CPU, which is slower.")


_warned = False
