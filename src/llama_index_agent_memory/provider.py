"""``load_llm`` of a saved `MLXPersistentLLM`, for programs that ask for it.

LlamaIndex makes a model from its dictionary by the name of its class, which it looks up in a table of its own. Nothing
is registered on import: `register_llm` does it.
"""

from __future__ import annotations

from llama_index.core.llms.loading import RECOGNIZED_LLMS

from llama_index_agent_memory.llm import MLXPersistentLLM


def register_llm() -> None:
    """Let LlamaIndex's ``load_llm(llm.to_dict())`` make an `MLXPersistentLLM`. Twice changes nothing."""
    RECOGNIZED_LLMS[MLXPersistentLLM.class_name()] = MLXPersistentLLM
