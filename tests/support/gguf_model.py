"""The embedded model as a GGUF file, in float32, for tests of what runs such files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from support.tiny_models import TOKENIZER

WRITER = Path(__file__).parents[2] / "benchmarks" / "rival_workers" / "gguf_file.py"


def write(file: Path) -> str:
    """Write the embedded model into a file and return its path."""
    weights: dict[str, Any] = {}
    for part in TOKENIZER.glob("*.safetensors"):
        weights |= mx.load(str(part))  # type: ignore[arg-type]
    as_float = {name: np.array(weight.astype(mx.float32)) for name, weight in weights.items()}
    _writer().write(TOKENIZER, file, as_float)
    return str(file)


def _writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_file", WRITER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
