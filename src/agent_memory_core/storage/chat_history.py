"""The text of a conversation in the terminal, because the whole history is given again at each turn.

A JSON file a session under ``<cache_dir>/transcripts``, mode 0600, named by a hash of namespace and session id.
Applications keep their own history and do not use this.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from agent_memory_core.errors import StoreError
from agent_memory_core.storage.sealing import PLAIN, Cipher, Locked

History = list[dict[str, str]]


class ChatHistory:
    """The messages of one session on disk; with the ``cipher`` of an encrypted store they are sealed."""

    def __init__(self, cache_dir: Path, namespace: str, session_id: str, cipher: Cipher = PLAIN) -> None:
        self._cipher = cipher
        self._about = f"transcript {session_id}"
        name = hashlib.sha256(json.dumps([namespace, session_id]).encode()).hexdigest()
        self._file = cache_dir / "transcripts" / f"{name}.json"

    def read(self) -> History:
        """The messages so far; none where they were sealed with a key that is gone.

        Raises:
            StoreError: the file cannot be read, or is not a transcript.
        """
        try:
            text = self._cipher.open_text(self._about, self._file.read_text(encoding="utf-8"))
            history: History = json.loads(text)
            return [{"role": message["role"], "content": message["content"]} for message in history]
        except (FileNotFoundError, Locked):
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"the transcript {self._file} cannot be read ({error}): delete it, or use another session."
            ) from error

    def write(self, history: History) -> None:
        """Replace the whole file.

        Raises:
            StoreError: the file cannot be written.
        """
        draft = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.touch(mode=0o600)
            sealed = self._cipher.seal_text(self._about, json.dumps(history))
            draft.write_text(sealed, encoding="utf-8")
            draft.replace(self._file)
        except OSError as error:
            raise StoreError(f"the transcript {self._file} cannot be written: {error}.") from error

    def delete(self) -> None:
        """Delete the file, if there is one.

        Raises:
            StoreError: the file cannot be deleted.
        """
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"the transcript {self._file} cannot be deleted: {error}.") from error
