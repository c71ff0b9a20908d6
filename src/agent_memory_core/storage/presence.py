"""Which processes have a store open: each holds a lock on a file of its own, which the system lets go when it ends.

A process id says less: another program may have it by now, and in a container it means another process.
"""

from __future__ import annotations

import fcntl
import os
import uuid
import weakref
from contextlib import suppress
from pathlib import Path

from agent_memory_core.storage.folder import entries, own_dir


class Presence:
    """Shows to everybody who opens the same store that this opening of it is not over, once `show` was called.

    Args:
        folder: where the files with the locks lie; it is made when it is missing.
    """

    name: str
    """what this opening is called in file names and in the catalog: 32 hex digits"""
    folder: Path
    """where everybody's files lie"""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self.folder = folder
        self._fd = -1
        _present.add(self)

    def show(self) -> None:
        """Make the file, also where somebody deleted it.

        Raises:
            OSError: it cannot be made or locked.
        """
        if self._fd >= 0 and self._is_there():
            return
        own_dir(self.folder)
        # Nobody may find the file before it is locked: he would take it for that of a process that has ended.
        hidden = self.folder / f".{self.name}"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(hidden, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(hidden, self.folder / self.name)
        except BaseException:
            os.close(fd)
            raise
        self._let_go()
        self._fd = fd

    def is_alive(self, name: str) -> bool:
        """Whether the opening of that name is not over, as far as can be told."""
        if name == self.name:
            return self._fd >= 0
        try:
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def remove_the_dead(self) -> None:
        """Delete the files of openings that are over."""
        for path in entries(self.folder):
            if not self.is_alive(path.name):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Say that this opening is over."""
        if self._fd >= 0:
            with suppress(OSError):
                (self.folder / self.name).unlink()
        self._let_go()

    def _is_there(self) -> bool:
        try:
            found, ours = os.stat(self.folder / self.name), os.fstat(self._fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self._let_go()


_present: weakref.WeakSet[Presence] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child must not keep its parent's locks."""
    for presence in list(_present):
        presence._let_go()


os.register_at_fork(after_in_child=_let_go_in_child)
