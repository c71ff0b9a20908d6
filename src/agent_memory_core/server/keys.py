"""API keys: who asks, and whose sessions those are. A key's namespace is the only one its requests ever reach."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_memory_core import InvalidSetting
from agent_memory_core.server.binding import check_binding
from agent_memory_core.server.errors import UNAUTHORIZED, ApiError
from agent_memory_core.server.settings import ServerSettings

KEY_HEADERS = ("x-api-key", "anthropic-api-key", "api-key")
"""Headers that carry a key, beside ``Authorization: Bearer``."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever holds a key."""

    namespace: str
    is_limited: bool = True
    """Whether the limits of turns in a time hold."""


NOBODY = Tenant("default", is_limited=False)
"""Everybody, where no key is asked for."""


class Keys:
    """The keys of a server. Only their hashes are kept.

    Args:
        settings: keys as text, of which each has a namespace made from its hash; and a file with named ones.

    Raises:
        InvalidSetting: the file cannot be read, or there is no key and anybody on the network could use the server.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._tenants: dict[str, Tenant] = {}
        self.read(settings)

    def read(self, settings: ServerSettings) -> None:
        """Read the keys again; those that are there stay where that fails. Raises as the constructor does."""
        hashes = [key_hash(key) for key in settings.api_keys]
        tenants = {digest: Tenant(f"key-{digest[:16]}") for digest in hashes}
        if settings.api_key_file is not None:
            tenants |= _read(settings.api_key_file)
        check_binding(settings, has_keys=bool(tenants))
        self._tenants = tenants

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, headers: Mapping[str, str]) -> Tenant:
        """Whose request it is. ``headers`` have lower-case names.

        Raises:
            ApiError: a key is asked for, and there is none, or an unknown one.
        """
        if not self._tenants:
            return NOBODY
        sent = key_hash(_sent_key(headers))
        # Every hash is compared, so that the time tells nothing.
        found = [tenant for digest, tenant in self._tenants.items() if hmac.compare_digest(digest, sent)]
        if not found:
            raise ApiError(
                UNAUTHORIZED, "Incorrect API key provided: send one of the server's keys as a bearer token."
            )
        return found[0]


def key_hash(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def _sent_key(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return next((headers[name] for name in KEY_HEADERS if headers.get(name)), "")


def _read(path: Path) -> dict[str, Tenant]:
    """Keys from a file: a table for each namespace, with ``sha256`` or ``key``, or a list of them."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"api_key_file={str(path)!r} cannot be read: {error}.") from error
    return {
        digest: Tenant(namespace)
        for namespace, table in tables.items()
        for digest in _hashes(table, namespace)
    }


def _hashes(table: Any, namespace: str) -> list[str]:
    hashes = table.get("sha256") if isinstance(table, dict) else None
    found = [hashes] if isinstance(hashes, str) else hashes
    if not isinstance(found, list) or not all(isinstance(h, str) and len(h) == 64 for h in found):
        raise InvalidSetting(
            f"the key {namespace!r} in api_key_file is not valid: a table with sha256, the hash of a key in 64 "
            "hexadecimal digits, or a list of them."
        )
    return [digest.lower() for digest in found]
