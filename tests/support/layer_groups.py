"""What the live caches of a model keep, in groups, read by forward passes that are never evaluated.

So a model of full size can be asked what it keeps without weights, memory or time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.utils import _get_classes

from agent_memory_core.kv.layout import LAYER_KINDS, KvLayout


@dataclass(frozen=True)
class Group:
    """Layers as the layout has them, made up. Only "append" and "window" have heads, only "window" a window."""

    kind: str
    layers: tuple[int, ...]
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None

    @property
    def layer_type(self) -> str:
        """The word of its kind in profiles."""
        return next(kind.layer_type for kind in LAYER_KINDS if kind.kind == self.kind)

    @property
    def shape(self) -> Group | None:
        """The form of one token."""
        return self if self.heads else None


def unevaluated(config: dict[str, Any]) -> Any:
    """A model of mlx-lm's own class for ``config``, none of whose weights exist yet."""
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))


def live_groups(model: Any) -> list[Any]:
    """The groups of ``model``, from its live cache objects."""
    return list(KvLayout(model).groups)
