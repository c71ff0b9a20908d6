"""The log: a line for each request, as text or as JSON. Prompts, answers, keys and session ids are not in it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

log = logging.getLogger("agent_memory.server")

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        said |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Write the log to standard error; a second call changes it."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def log_request(level: int, fields: Mapping[str, Any]) -> None:
    """Log a request by its fields."""
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    log.log(level, "%s", text, extra={"fields": dict(fields)})


def short_hash(session_id: str | None) -> str:
    """What stands for a session id: enough to find its requests, and not the id."""
    return hashlib.sha256(session_id.encode(errors="replace")).hexdigest()[:8] if session_id else "-"
