"""What the live caches of a model keep, in groups, read by a forward pass of one token that is never evaluated.

So a model of full size can be asked what it keeps without weights, memory or time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import _get_classes


@dataclass(frozen=True)
class Group:
    """Layers of one kind and form. Only "append" and "window" have a form, only "window" a window."""

    kind: str
    layers: tuple[int, ...]
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    dtype: mx.Dtype = mx.float32
    window: int | None = None


def unevaluated(config: dict[str, Any]) -> Any:
    """A model of mlx-lm's own class for ``config``, none of whose weights exist yet."""
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))


def live_groups(model: Any) -> list[Group]:
    """The groups of ``model``, from its live cache objects."""
    cache = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    layers: dict[Group, list[int]] = {}
    for index, entry in enumerate(cache):
        for leaf in _leaves(entry):
            layers.setdefault(_form(leaf), []).append(index)
    return [Group(**{**vars(form), "layers": tuple(found)}) for form, found in layers.items()]


def _leaves(entry: Any) -> Iterator[Any]:
    if isinstance(entry, CacheList):
        for inner in entry.caches:
            yield from _leaves(inner)
    else:
        yield entry


def _form(cache: Any) -> Group:
    if type(cache) is ArraysCache:
        return Group("state", ())
    if type(cache) not in (KVCache, RotatingKVCache):
        return Group("snapshot", ())
    _, heads, _, key_dim = cache.keys.shape
    window = cache.max_size if isinstance(cache, RotatingKVCache) else None
    kind = "append" if window is None else "window"
    return Group(kind, (), heads, key_dim, cache.values.shape[3], cache.keys.dtype, window)
