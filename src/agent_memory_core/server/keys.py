"""API keys: who asks, and whose sessions those are. A key's namespace is the only one its requests ever reach."""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import RateLimitItem, parse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent_memory_core import InvalidSetting
from agent_memory_core.server.binding import check_binding
from agent_memory_core.server.errors import UNAUTHORIZED, ApiError
from agent_memory_core.server.settings import Rate, ServerSettings

KEY_HEADERS = ("x-api-key", "anthropic-api-key", "api-key")
"""Headers that carry a key, beside ``Authorization: Bearer``."""

_HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever holds a key. Limits that are None are those of the settings."""

    namespace: str
    is_limited: bool = True
    """Whether the limits of turns in a time hold."""
    rate_per_session: RateLimitItem | None = None
    rate_per_key: RateLimitItem | None = None
    max_in_flight: int | None = None
    """Most turns of the namespace that run or wait."""


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
        self._most: dict[str, int | None] = {}
        self.read(settings)

    def read(self, settings: ServerSettings) -> None:
        """Read the keys again; those that are there stay where that fails. Raises as the constructor does."""
        hashes = [key_hash(key) for key in settings.api_keys]
        tenants = {digest: Tenant(f"key-{digest[:16]}") for digest in hashes}
        if settings.api_key_file is not None:
            tenants |= _read(settings.api_key_file)
        check_binding(settings, has_keys=bool(tenants))
        self._tenants = tenants
        self._most = {tenant.namespace: tenant.max_in_flight for tenant in tenants.values()}

    def max_in_flight(self, namespace: str) -> int | None:
        """Most turns of a namespace that run or wait; None where the settings say it."""
        return self._most.get(namespace)

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


class _Table(BaseModel):
    """What the file says of a namespace."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str | list[str]
    rate_per_session: Rate | None = None
    rate_per_key: Rate | None = None
    max_in_flight: int | None = Field(default=None, ge=1)

    @field_validator("sha256", mode="after")
    @classmethod
    def _listed(cls, value: str | list[str]) -> list[str]:
        hashes = [value] if isinstance(value, str) else value
        if not hashes or not all(_HASH.fullmatch(digest) for digest in hashes):
            raise ValueError
        return [digest.lower() for digest in hashes]

    def tenant(self, namespace: str) -> Tenant:
        """Whoever holds one of its keys."""
        return Tenant(
            namespace,
            rate_per_session=parse(self.rate_per_session) if self.rate_per_session else None,
            rate_per_key=parse(self.rate_per_key) if self.rate_per_key else None,
            max_in_flight=self.max_in_flight,
        )


def _read(path: Path) -> dict[str, Tenant]:
    """Keys from a file: a table for each namespace.

    Raises:
        InvalidSetting: it cannot be read, or a table says what cannot be used.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"api_key_file={str(path)!r} cannot be read: {error}.") from error
    return {
        digest: tenant
        for namespace, said in tables.items()
        for table in [_table(said, namespace)]
        for tenant in [table.tenant(namespace)]
        for digest in table.sha256
    }


def _table(said: object, namespace: str) -> _Table:
    try:
        return _Table.model_validate(said)
    except ValidationError as wrong:
        # A misspelled name comes before the one that is missing for it.
        first = min(wrong.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise InvalidSetting(f"the key {namespace!r} in api_key_file is not valid: {_why(first)}.") from None


def _why(first: Mapping[str, Any]) -> str:
    """What is wrong with a table. Only limits are quoted: whatever else stands there may be a key."""
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"the name {name!r} is none of {', '.join(_Table.model_fields)}"
    if name in _Table.model_fields and name != "sha256":
        return f"{name}={first['input']!r}: {first['msg']}"
    return "a table with sha256, the hash of a key in 64 hexadecimal digits, or a list of them"
