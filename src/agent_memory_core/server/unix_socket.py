"""Unix sockets that only their owner can open."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_memory_core import InvalidSetting


@contextmanager
def listening(path: Path | None, setting: str) -> Iterator[socket.socket | None]:
    """Listen at ``path``, if there is one, and remove it at the end. What a server left behind there is replaced.

    Args:
        path: where; None is nowhere.
        setting: the name of the setting that says so, for errors.

    Raises:
        InvalidSetting: something else is there, another server listens, or the path cannot be used.
    """
    if path is None:
        yield None
        return
    with _bound(path, setting) as listener:
        yield listener
        path.unlink(missing_ok=True)


def _bound(path: Path, setting: str) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_left_over(path, setting)
    listener = socket.socket(socket.AF_UNIX)
    # The socket is made with its mode, so that there is no moment in which others could open it.
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise InvalidSetting(f"{setting}={str(path)!r} cannot be used: {error}.") from error
    finally:
        os.umask(before)
    return listener


def _remove_left_over(path: Path, setting: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket or _is_alive(path):
        what = "another server listens there" if is_socket else "it is no socket"
        raise InvalidSetting(f"{setting}={str(path)!r} cannot be used: {what}.")
    path.unlink()


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
