"""What the adapters of all frameworks share: a model's fields, and the steps from a framework's call to a turn."""

from agent_memory_core.adapter.messages import joined, measurements, merge_leading_systems, unreadable_part
from agent_memory_core.adapter.options import check_neutral, template_kwargs
from agent_memory_core.adapter.schemas import to_response_schema
from agent_memory_core.adapter.sessions import chosen_text, session_text
from agent_memory_core.adapter.settings import AdapterSettings, Turn, UnknownSetting
from agent_memory_core.adapter.tools import chosen_tool, id_of

__all__ = [
    "AdapterSettings",
    "Turn",
    "UnknownSetting",
    "check_neutral",
    "chosen_text",
    "chosen_tool",
    "id_of",
    "joined",
    "measurements",
    "merge_leading_systems",
    "session_text",
    "template_kwargs",
    "to_response_schema",
    "unreadable_part",
]
