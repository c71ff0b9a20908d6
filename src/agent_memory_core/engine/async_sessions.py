"""The sessions of an `AgentMemory` for coroutines: each runs the method of the same name on another thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from agent_memory_core.engine.memory_sessions import MemorySessions
from agent_memory_core.messages import BranchInfo, SessionInfo, Transcript
from agent_memory_core.storage.audit import CheckReport


class AsyncSessions(MemorySessions):
    """Coroutines that block no event loop. They take, return and raise what their twins do.

    A coroutine that is cancelled returns at once; what its twin has begun is done all the same.
    """

    async def asessions(
        self, namespace: str | None = None, *, limit: int | None = None, offset: int = 0
    ) -> list[SessionInfo]:
        """`sessions` for coroutines."""
        return await asyncio.to_thread(self.sessions, namespace, limit=limit, offset=offset)

    async def abranches(self, session_id: str, namespace: str = "default") -> list[BranchInfo]:
        """`branches` for coroutines."""
        return await asyncio.to_thread(self.branches, session_id, namespace)

    async def atranscript(
        self, session_id: str, namespace: str = "default", branch_id: int | None = None
    ) -> Transcript:
        """`transcript` for coroutines."""
        return await asyncio.to_thread(self.transcript, session_id, namespace, branch_id)

    async def afork(self, session_id: str, new_session_id: str, namespace: str = "default") -> None:
        """`fork` for coroutines."""
        await asyncio.to_thread(self.fork, session_id, new_session_id, namespace)

    async def apin(self, session_id: str, namespace: str = "default", *, pinned: bool = True) -> None:
        """`pin` for coroutines."""
        await asyncio.to_thread(self.pin, session_id, namespace, pinned=pinned)

    async def aflush(self) -> None:
        """`flush` for coroutines."""
        await asyncio.to_thread(self.flush)

    async def arelease(self, session_id: str, namespace: str = "default") -> int:
        """`release` for coroutines."""
        return await asyncio.to_thread(self.release, session_id, namespace)

    async def aforget(self, session_id: str, namespace: str = "default") -> bool:
        """`forget` for coroutines."""
        return await asyncio.to_thread(self.forget, session_id, namespace)

    async def aforget_namespace(self, namespace: str) -> int:
        """`forget_namespace` for coroutines."""
        return await asyncio.to_thread(self.forget_namespace, namespace)

    async def aexport_session(self, session_id: str, file: BinaryIO, namespace: str = "default") -> int:
        """`export_session` for coroutines."""
        return await asyncio.to_thread(self.export_session, session_id, file, namespace)

    async def aexport_prompt_cache(
        self,
        session_id: str,
        path: str | Path,
        namespace: str = "default",
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """`export_prompt_cache` for coroutines."""
        return await asyncio.to_thread(
            self.export_prompt_cache, session_id, path, namespace, metadata=metadata
        )

    async def aimport_session(self, session_id: str, file: BinaryIO, namespace: str = "default") -> int:
        """`import_session` for coroutines."""
        return await asyncio.to_thread(self.import_session, session_id, file, namespace)

    async def aprune(
        self,
        older_than: float | timedelta,
        namespace: str | None = None,
        *,
        dry_run: bool = False,
    ) -> list[SessionInfo]:
        """`prune` for coroutines."""
        return await asyncio.to_thread(self.prune, older_than, namespace, dry_run=dry_run)

    async def acheck(self, *, fix: bool = False) -> CheckReport:
        """`check` for coroutines."""
        return await asyncio.to_thread(self.check, fix=fix)
