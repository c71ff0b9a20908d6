"""The text of a command-line conversation, so that it can be given whole at its next turn.

A JSON file a session under ``<cache_dir>/transcripts``, mode 0600, named by a hash of namespace and session id.
Applications keep their own history and never come here.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from agent_memory_core.messages import validate_namespace, validate_session_id

History = list[dict[str, str]]


class Transcript:
    """The messages of one session on disk.

    Raises:
        InvalidRequest: the namespace or the session id cannot be used.
    """

    def __init__(self, cache_dir: Path, namespace: str, session_id: str) -> None:
        validate_namespace(namespace)
        validate_session_id(session_id)
        name = hashlib.sha256(json.dumps([namespace, session_id]).encode()).hexdigest()
        self._file = cache_dir / "transcripts" / f"{name}.json"

    def read(self) -> History:
        """The messages so far."""
        if not self._file.exists():
            return []
        history: History = json.loads(self._file.read_text())
        return history

    def write(self, history: History) -> None:
        """Replace the messages at once."""
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._file.with_suffix(f".{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(history, ensure_ascii=False))
        draft.replace(self._file)

    def delete(self) -> None:
        """Forget the messages."""
        self._file.unlink(missing_ok=True)
