"""Persistent KV-cache memory for LLM agents on MLX.

`AgentMemory` is the way in; the other names are what crosses its border.
"""

from agent_memory_core.errors import (
    AgentMemoryError,
    BackendMissing,
    Cancelled,
    EngineStopped,
    InvalidRequest,
    InvalidSetting,
    ModelError,
    ModelNotFound,
    PromptTooLong,
    SessionNotFound,
    StoreError,
    StoreFull,
    StoreUnreadable,
)

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise BackendMissing(
        "MLX has no backend on this machine: install one with the extra cpu, cuda12 or cuda13, "
        "for example pip install 'agent-memory-mlx[cpu]'."
    ) from error

from agent_memory_core.adapter import AdapterSettings
from agent_memory_core.config import EngineConfig, SamplingParams
from agent_memory_core.environment import resolve_sampling, resolve_settings
from agent_memory_core.memory import AgentMemory, AsyncChatStream, ChatStream
from agent_memory_core.messages import (
    BranchInfo,
    ChatRequest,
    ChatResult,
    Delta,
    InvalidToolCall,
    Message,
    SessionInfo,
    SessionKey,
    TokenLogprob,
    ToolCall,
    TurnReport,
    Usage,
)
from agent_memory_core.models.parity import ParityResult
from agent_memory_core.models.profile import sampling_for, settings_for
from agent_memory_core.storage.audit import CheckReport

__all__ = [
    "AdapterSettings",
    "AgentMemory",
    "AgentMemoryError",
    "AsyncChatStream",
    "BackendMissing",
    "BranchInfo",
    "Cancelled",
    "ChatRequest",
    "ChatResult",
    "ChatStream",
    "CheckReport",
    "Delta",
    "EngineConfig",
    "EngineStopped",
    "InvalidRequest",
    "InvalidSetting",
    "InvalidToolCall",
    "Message",
    "ModelError",
    "ModelNotFound",
    "ParityResult",
    "PromptTooLong",
    "SamplingParams",
    "SessionInfo",
    "SessionKey",
    "SessionNotFound",
    "StoreError",
    "StoreFull",
    "StoreUnreadable",
    "TokenLogprob",
    "ToolCall",
    "TurnReport",
    "Usage",
    "resolve_sampling",
    "resolve_settings",
    "sampling_for",
    "settings_for",
]
