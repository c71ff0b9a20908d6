"""Persistent KV-cache memory for LLM agents on MLX.

`AgentMemory` is the way in; the other names are what crosses its border. Errors, settings and messages come with the
package. The other names are imported when they are first used, so that importing the package costs little.
"""

import importlib
from typing import TYPE_CHECKING, Any

from agent_memory_core.backend import require_mlx
from agent_memory_core.config import EngineConfig, SamplingParams
from agent_memory_core.environment import resolve_sampling, resolve_settings
from agent_memory_core.errors import (
    AgentMemoryError,
    BackendMissing,
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    InvalidSetting,
    ModelError,
    ModelNotFound,
    OutOfGpuMemory,
    OverBudget,
    PromptTooLong,
    QueueFull,
    SessionNotFound,
    StoreError,
    StoreFull,
    StoreUnreadable,
)
from agent_memory_core.messages import (
    BranchInfo,
    ChatRequest,
    ChatResult,
    Delta,
    InvalidToolCall,
    Message,
    Miss,
    SessionInfo,
    SessionKey,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Transcript,
    TurnReport,
    Usage,
    validate_namespace,
    validate_session_id,
    whole_answer,
)

if TYPE_CHECKING:
    from agent_memory_core.adapter import AdapterSettings, UnknownSetting
    from agent_memory_core.doctor import Finding, examine_machine
    from agent_memory_core.engine.events import (
        BlocksEvicted,
        FirstToken,
        TurnAdmitted,
        TurnCancelled,
        TurnEvent,
        TurnFailed,
        TurnFinished,
        TurnInfo,
        TurnProgress,
        TurnQueued,
        TurnSaved,
    )
    from agent_memory_core.engine.requests import Conversation, to_request
    from agent_memory_core.engine.residency import Residency
    from agent_memory_core.engine.stats import MemoryStats, Stats, StoreStats
    from agent_memory_core.engine.streams import AsyncChatStream, ChatStream
    from agent_memory_core.memory import AgentMemory
    from agent_memory_core.models.description import KnownValue, KvCost, ModelDescription, describe_model
    from agent_memory_core.models.folder import weights_on_disk
    from agent_memory_core.models.new_profile import NewProfile, write_profile
    from agent_memory_core.models.parity import ParityResult
    from agent_memory_core.models.profile import Profile, list_profiles, sampling_for, settings_for
    from agent_memory_core.storage.audit import CheckReport
    from agent_memory_core.storage.chat_history import ChatHistory
    from agent_memory_core.storage.sealing import Cipher, Locked

_MODULES = {
    "AdapterSettings": "adapter",
    "AgentMemory": "memory",
    "AsyncChatStream": "engine.streams",
    "BlocksEvicted": "engine.events",
    "ChatHistory": "storage.chat_history",
    "ChatStream": "engine.streams",
    "CheckReport": "storage.audit",
    "Cipher": "storage.sealing",
    "FirstToken": "engine.events",
    "Locked": "storage.sealing",
    "MemoryStats": "engine.stats",
    "Conversation": "engine.requests",
    "Finding": "doctor",
    "examine_machine": "doctor",
    "Residency": "engine.residency",
    "to_request": "engine.requests",
    "weights_on_disk": "models.folder",
    "Stats": "engine.stats",
    "StoreStats": "engine.stats",
    "TurnAdmitted": "engine.events",
    "TurnCancelled": "engine.events",
    "TurnEvent": "engine.events",
    "TurnFailed": "engine.events",
    "TurnFinished": "engine.events",
    "TurnInfo": "engine.events",
    "TurnProgress": "engine.events",
    "TurnQueued": "engine.events",
    "TurnSaved": "engine.events",
    "UnknownSetting": "adapter",
    "Profile": "models.profile",
    "list_profiles": "models.profile",
    "sampling_for": "models.profile",
    "settings_for": "models.profile",
}
"""Where the names are that are imported when they are first used."""

_MODULES_WITH_MLX = {
    "KnownValue": "models.description",
    "KvCost": "models.description",
    "ModelDescription": "models.description",
    "NewProfile": "models.new_profile",
    "ParityResult": "models.parity",
    "describe_model": "models.description",
    "write_profile": "models.new_profile",
}
"""The same for names whose modules import MLX."""


if not TYPE_CHECKING:  # A type checker would believe that every name exists.

    def __getattr__(name: str) -> Any:
        if name in _MODULES_WITH_MLX:
            require_mlx()
        module = _MODULES.get(name) or _MODULES_WITH_MLX.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AdapterSettings",
    "AgentMemory",
    "AgentMemoryError",
    "AsyncChatStream",
    "BackendMissing",
    "BlocksEvicted",
    "BranchInfo",
    "Cancelled",
    "ChatHistory",
    "ChatRequest",
    "ChatResult",
    "ChatStream",
    "CheckReport",
    "Cipher",
    "Conversation",
    "DeadlineExceeded",
    "Delta",
    "EngineConfig",
    "EngineStopped",
    "Finding",
    "FirstToken",
    "InvalidRequest",
    "InvalidSetting",
    "InvalidToolCall",
    "KnownValue",
    "KvCost",
    "Locked",
    "MemoryStats",
    "Message",
    "Miss",
    "ModelDescription",
    "ModelError",
    "ModelNotFound",
    "NewProfile",
    "OutOfGpuMemory",
    "OverBudget",
    "ParityResult",
    "Profile",
    "PromptTooLong",
    "QueueFull",
    "Residency",
    "SamplingParams",
    "SessionInfo",
    "SessionKey",
    "SessionNotFound",
    "Stats",
    "StoreError",
    "StoreFull",
    "StoreStats",
    "StoreUnreadable",
    "TokenLogprob",
    "ToolCall",
    "ToolCallPiece",
    "Transcript",
    "TurnAdmitted",
    "TurnCancelled",
    "TurnEvent",
    "TurnFailed",
    "TurnFinished",
    "TurnInfo",
    "TurnProgress",
    "TurnQueued",
    "TurnReport",
    "TurnSaved",
    "UnknownSetting",
    "Usage",
    "describe_model",
    "examine_machine",
    "list_profiles",
    "resolve_sampling",
    "resolve_settings",
    "sampling_for",
    "settings_for",
    "to_request",
    "validate_namespace",
    "validate_session_id",
    "weights_on_disk",
    "whole_answer",
    "write_profile",
]
