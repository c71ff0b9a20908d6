"""What agents take: in memory, and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agent_memory_core import Stats
from agent_memory_core.agents.contexts import AgentContext


def memory_usage(
    weights: int, stats: Stats, agents: Mapping[str, AgentContext], nbytes: Mapping[str, int]
) -> dict[str, Any]:
    """See `PersistentAgentManager.get_memory_usage`; ``weights`` is in bytes, ``nbytes`` are those of every session."""
    cached = stats.memory.block_bytes + stats.memory.live_bytes
    return {
        "model_memory_gb": weights / 2**30,
        "agents": {
            name: {"cache_tokens": context.cache_tokens, "cache_mb": nbytes.get(name, 0) / 2**20}
            for name, context in agents.items()
        },
        "total_cache_mb": cached / 2**20,
        "total_gb": (weights + cached) / 2**30,
    }


def disk_usage(stats: Stats, agents: Iterable[str], nbytes: Mapping[str, int]) -> dict[str, Any]:
    """See `PersistentAgentManager.get_disk_usage`; ``nbytes`` are those of every session."""
    per_agent = [(agent_id, nbytes.get(agent_id, 0)) for agent_id in agents]
    total = stats.store.bytes if stats.store is not None else 0
    return {
        "total_bytes": total,
        "total_mb": total / 2**20,
        "num_agents": len(per_agent),
        "per_agent": sorted(per_agent, key=lambda pair: (-pair[1], pair[0])),
        "shared_bytes": max(0, sum(size for _, size in per_agent) - total),
    }
