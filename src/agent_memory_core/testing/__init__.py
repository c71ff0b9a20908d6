"""Helpers for the tests of applications: small models of real architectures, without a download.

    from agent_memory_core import AgentMemory
    from agent_memory_core.testing import write_random_model

    def test_my_agent(tmp_path):
        model = write_random_model(tmp_path / "model")
        with AgentMemory(model=str(model), cache_dir=tmp_path / "sessions") as memory:
            ...

The answers of such a model are nonsense, but they are the same in every run. A model that answers in words is
"tiny-chat", the default of `AgentMemory`. To see what happens to turns, collect the events in a list:
``memory.observe(events.append)``.
"""

from agent_memory_core.testing.random_models import FAMILIES, random_model, save_model, write_random_model

__all__ = ["FAMILIES", "random_model", "save_model", "write_random_model"]
