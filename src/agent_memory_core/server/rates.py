"""How many turns one key and one session may start in a time. Nothing is counted where no key is asked for."""

from __future__ import annotations

import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from agent_memory_core import SessionKey
from agent_memory_core.server.errors import RATE_LIMITED, ApiError
from agent_memory_core.server.keys import Tenant
from agent_memory_core.server.settings import ServerSettings


class Rates:
    """The limits of a server. Counted in this process only, which is the one that serves."""

    def __init__(self, settings: ServerSettings) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self.read(settings)

    def read(self, settings: ServerSettings) -> None:
        """Take other limits; what was counted stands."""
        self._per_key, self._per_session = parse(settings.rate_per_key), parse(settings.rate_per_session)

    def check(self, tenant: Tenant, key: SessionKey) -> None:
        """Count a turn.

        Raises:
            ApiError: it is one too many.
        """
        if not tenant.is_limited:
            return
        self._hit(tenant.rate_per_key or self._per_key, "This key", tenant.namespace)
        if key.session_id is not None:
            per_session = tenant.rate_per_session or self._per_session
            self._hit(per_session, "This session", tenant.namespace, key.session_id)

    def _hit(self, limit: RateLimitItem, whose: str, *names: str) -> None:
        if self._limiter.hit(limit, *names):
            return
        wait = self._limiter.get_window_stats(limit, *names).reset_time - time.time()
        raise ApiError(
            RATE_LIMITED,
            f"{whose} has had its turns for now, {limit}: ask again in {max(1, round(wait))} seconds.",
            retry_after=wait,
        )
