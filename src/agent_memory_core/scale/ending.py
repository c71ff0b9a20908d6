"""How a replica ends: no more turns are taken, and what waits is uploaded, so that its sessions move without a loss."""

from __future__ import annotations

import contextlib

from agent_memory_core import StoreError
from agent_memory_core.server.serving import Server


def end(server: Server, seconds: float) -> bool:
    """Refuse turns, upload what waits for so many seconds at most, close the memory; say whether all is uploaded.

    What is not uploaded stays in the queue on this disk. Turns in flight have ended: whoever calls this waits for them.
    """
    server.turns.draining = True
    memory = server.host.memory
    done = False
    try:
        with contextlib.suppress(StoreError):
            memory.flush()
            done = memory.cold.flush(seconds)
    finally:
        memory.close()
    return done
