"""From a model's name to its weights, tokenizer and fingerprint.

The fingerprint tells two models of equal geometry apart, so that neither ever uses the stored KV of the other. It is a
sha256 over the architecture config, the adapter, the tokenizer's files and the weights (all bytes of small files;
headers, sizes and evenly spaced samples of large ones). The chat template is left out: it decides which tokens a prompt
has, and stored KV is found by tokens.
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
from huggingface_hub.errors import StrictDataclassError
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load

from agent_memory_core.config import ComputeDtype
from agent_memory_core.errors import ModelError, ModelNotFound
from agent_memory_core.fast_blas import load_openblas
from agent_memory_core.models.folder import find_model, stated_context

log = logging.getLogger("agent_memory")

WHOLE_FILE = 256 * 2**20
"""Weight files up to this many bytes are hashed whole."""

QUANTISED = (QuantizedLinear, QuantizedEmbedding, QuantizedSwitchLinear)
"""Layers whose weights have their own form of few bits, and kernels that suit it."""

SAMPLES, SAMPLE_BYTES = 1024, 16 * 1024
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    name: str
    """The model as the user wrote it."""
    model: Any
    """The network, evaluated."""
    tokenizer: TokenizerWrapper
    fingerprint: str
    """A sha256 hex digest, see the module's docstring."""
    context_length: int
    """In tokens."""
    config: dict[str, Any]
    """The model's config.json."""


def load_model(
    model: str,
    adapter_path: str | None = None,
    context_length: int | None = None,
    compute_dtype: ComputeDtype = "stored",
) -> LoadedModel:
    """Load weights and tokenizer, evaluated, on the calling thread.

    Args:
        model: an embedded name, a folder or a hub id.
        adapter_path: a folder of LoRA adapters.
        context_length: the limit in tokens where the model's config states none.
        compute_dtype: see `EngineConfig.compute_dtype`.

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
    if _computes_in_float32(compute_dtype, network):
        network.set_dtype(mx.float32)
        mx.eval(network.parameters())
    return LoadedModel(
        name=str(model),
        model=network,
        tokenizer=tokenizer,
        fingerprint=fingerprint(folder, adapter_path),
        context_length=stated_context(config, context_length),
        config=config,
    )


def _computes_in_float32(wanted: ComputeDtype, network: Any) -> bool:
    if any(isinstance(part, QUANTISED) for part in network.modules()):
        return False
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return wanted == "float32" or (wanted == "auto" and on_cpu and load_openblas() is not None)


def fingerprint(folder: Path, adapter_path: str | None = None) -> str:
    """Hash everything that the KV of a token depends on; see the module's docstring."""
    digest = hashlib.sha256(b"agent-memory model 1")
    _add_file(digest, folder / "config.json", whole=True)
    for file in sorted(folder.glob("[!.]*.safetensors")):
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
