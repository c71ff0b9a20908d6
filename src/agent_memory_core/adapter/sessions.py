"""Session ids as frameworks have them: text, whole numbers and UUIDs."""

from __future__ import annotations

from uuid import UUID

from agent_memory_core.errors import InvalidRequest


def session_text(value: object) -> str | None:
    """A session id or namespace as text; None for what is not text, a whole number or a UUID."""
    if isinstance(value, (str, int, UUID)) and not isinstance(value, bool) and value != "":
        return str(value)
    return None


def chosen_text(value: object, name: str) -> str | None:
    """The same for a value that the caller has chosen, which is not passed over where it cannot be used.

    Raises:
        InvalidRequest: it is neither text, a whole number nor a UUID.
    """
    text = session_text(value)
    if text is None and value is not None and value != "":
        raise InvalidRequest(f"{name}={value!r} is not valid: text, a whole number or a UUID.")
    return text
