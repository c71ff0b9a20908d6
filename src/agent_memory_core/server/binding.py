"""Whether a server may listen where it is told to."""

from __future__ import annotations

import ipaddress

from agent_memory_core import InvalidSetting
from agent_memory_core.server.logs import log
from agent_memory_core.server.settings import ServerSettings


def check_binding(settings: ServerSettings, *, has_keys: bool) -> None:
    """Check that only this machine reaches a server that asks for no key.

    Raises:
        InvalidSetting: others would.
    """
    if has_keys or settings.uds is not None or is_loopback(settings.host):
        return
    if not settings.insecure_no_auth:
        raise InvalidSetting(
            f"host={settings.host!r} without keys would let anybody on the network in: set "
            "AGENT_MEMORY_SERVER_API_KEYS or --api-key-file, or listen on 127.0.0.1. --insecure-no-auth listens "
            "all the same."
        )
    log.warning("anybody who reaches %s may use this server: it asks for no key", settings.host)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
