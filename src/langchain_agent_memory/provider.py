"""``init_chat_model("mlx_persistent:tiny-chat")``, for programs that ask for it.

LangChain keeps the providers of ``init_chat_model`` in a private table, without a public way to add one. So nothing is
registered on import: ``register_provider()`` does it, and raises an error if a release of LangChain has no such table.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from langchain_core.language_models import BaseChatModel

_TABLE = "_BUILTIN_PROVIDERS"


def register_provider(name: str = "mlx_persistent") -> None:
    """Let LangChain's ``init_chat_model`` make a ``ChatMLXPersistent`` of ``<name>:<model>``. Twice changes nothing.

    Args:
        name: what the provider is called.

    Raises:
        ImportError: LangChain is not installed, or this release of it takes no providers.
        ValueError: another provider has that name.
    """
    try:
        base: Any = import_module("langchain.chat_models.base")
    except ImportError as error:
        raise ImportError(
            "register_provider needs LangChain: pip install 'agent-memory-mlx[agents]'."
        ) from error
    table = getattr(base, _TABLE, None)
    if not isinstance(table, dict):
        raise ImportError(
            f"langchain {version('langchain')} keeps no {_TABLE} in langchain.chat_models.base, so it takes no "
            "providers: make a ChatMLXPersistent and hand it over instead of a name."
        )
    entry = ("langchain_agent_memory", "ChatMLXPersistent", _make)
    if table.setdefault(name, entry) != entry:
        raise ValueError(
            f"name={name!r} is not valid: LangChain has a provider of that name, {table[name][0]}."
        )


def _make(cls: type[BaseChatModel], **settings: Any) -> BaseChatModel:
    return cls(**settings)
