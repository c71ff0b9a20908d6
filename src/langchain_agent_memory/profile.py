"""What LangChain asks of every model before it calls it: the model's profile."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

from langchain_core.language_models.model_profile import ModelProfile

from agent_memory_core import AgentMemory, SamplingParams

_ALWAYS: dict[str, Any] = {
    "open_weights": True,
    "temperature": True,
    "attachment": False,
    "text_inputs": True,
    "text_outputs": True,
    "tool_calling": True,
    "tool_call_streaming": True,
    **{f"{kind}_inputs": False for kind in ("image", "image_url", "pdf", "audio", "video")},
    **{f"{kind}_outputs": False for kind in ("image", "audio", "video")},
    **{f"{kind}_tool_message": False for kind in ("image", "pdf")},
}
"""What holds for any model here: it reads and writes text."""


def profile_of(memory: AgentMemory, sampling: SamplingParams) -> ModelProfile:
    """The profile of a memory's model, without loading it; what is not known yet is left out.

    ``max_output_tokens`` is how long an answer gets unless its call says otherwise. Only keys that this release of
    LangChain knows are there: it warns of others.
    """
    holds_form = find_spec("llguidance") is not None
    told = _ALWAYS | {
        "name": memory.model_name,
        "max_input_tokens": memory.stated_context_length,
        "max_output_tokens": sampling.max_tokens,
        "reasoning_output": memory.stated_reasoning,
        "tool_choice": holds_form,
        "structured_output": holds_form,
    }
    known = ModelProfile.__annotations__
    return cast(ModelProfile, {k: value for k, value in told.items() if k in known and value is not None})
