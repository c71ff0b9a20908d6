"""`make unit` runs no model: a unit test that needs one is marked ``model``."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _runs_no_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail that runs a model and does not say so: every language model begins with its embedding."""
    if request.node.get_closest_marker("model") is not None:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this test runs a model: mark it with pytest.mark.model")

    monkeypatch.setattr("mlx.nn.Embedding.__call__", refuse)
    monkeypatch.setattr("mlx.nn.QuantizedEmbedding.__call__", refuse)
