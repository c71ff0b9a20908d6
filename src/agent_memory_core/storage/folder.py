"""The folder of a store, which must be private, on a local disk and of our version; and system calls for its files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shlex
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent_memory_core.errors import StoreUnreadable
from agent_memory_core.storage.macos import exclude_from_backup, is_macos, syncing_cloud

log = logging.getLogger("agent_memory")

FORMAT = 4
"""Version of a store: its folder and its catalog."""

SEALED_FORMAT = 5
"""Version of a store that is encrypted, which is otherwise one of version `FORMAT`: older programs must refuse it."""

OLDEST_FORMAT = 2
"""The oldest version that can be read; it is brought to the newest when the store is opened."""

REMOTE = {"nfs", "nfs4", "smbfs", "smb3", "cifs", "afpfs", "webdav", "fuse.sshfs"}
"""File systems of other machines, which are refused."""

_CACHE_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# This file marks a cache directory, here that of agent-memory, for programs that make backups.
# See https://bford.info/cachedir/
"""

# macOS's arguments of fcntl, which Python does not name.
_F_BARRIERFSYNC = 85
_F_FULLFSYNC = 51


def prepare_root(path: Path) -> bool:
    """Make the folder, or refuse one that others can read or that a cloud may empty; return whether it can be written.

    A new folder is marked as a cache, which backups and the index of Spotlight leave out.

    Raises:
        StoreUnreadable: the folder cannot be used; the message says why and what to do.
    """
    try:
        if cloud := syncing_cloud(path):
            raise StoreUnreadable(
                f"{path} is kept by {cloud}, which may take files off this machine at any time: set a cache_dir that "
                f"is not synced, such as ~/.agent_memory/caches."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = make_dir(path)
        found = os.stat(path)
    except OSError as error:
        raise StoreUnreadable(f"{path} cannot be made: {error.strerror}. Set another cache_dir.") from error
    _require_private(path, found)
    kind = file_system(path)
    if kind in REMOTE:
        raise StoreUnreadable(
            f"{path} is on {kind}, where locks and shared memory cannot be relied on. Set a cache_dir on a local disk."
        )
    if _is_read_only(path, found):
        return False
    # A folder that was there may hold what somebody wants in his backups.
    if is_new or not entries(path):
        _mark_as_cache(path)
    return True


def _is_read_only(path: Path, found: os.stat_result) -> bool:
    # Root can write where the folder says that nobody should.
    wanted = bool(found.st_mode & stat.S_IWUSR)
    return not wanted or bool(os.statvfs(path).f_flag & os.ST_RDONLY) or not os.access(path, os.W_OK)


def _require_private(path: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        raise StoreUnreadable(f"{path} is not a folder. Set another cache_dir.")
    if found.st_uid != os.geteuid():
        raise StoreUnreadable(
            f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}. Set another cache_dir."
        )
    if mode & 0o077 or mode & 0o500 != 0o500:
        raise StoreUnreadable(
            f"{path} has mode {mode:04o}, but what lies there is as private as the conversations: chmod 700 {path}"
        )


def _mark_as_cache(path: Path) -> None:
    """Ask backups and Spotlight to leave the folder out. Where that fails, they take it with them: no harm is done."""
    texts = {"CACHEDIR.TAG": _CACHE_TAG}
    if is_macos():
        texts[".metadata_never_index"] = ""
    for name, text in texts.items():
        with suppress(OSError):
            fd = os.open(
                path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            with open(fd, "w") as file:
                file.write(text)
    exclude_from_backup(path)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but for hidden names, see `is_hidden`; nothing where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_small(path: Path, most: int = 65536) -> str:
    """The text of a file of ours that is small.

    Raises:
        OSError: it is no regular file, is larger than ``most`` bytes, or cannot be read.
    """
    with open(path, encoding="utf-8", opener=_open_to_read) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise OSError(errno.EINVAL, "it is not a small file")
        return file.read()


def is_hidden(name: str) -> bool:
    """Whether a file is the system's own: ``.DS_Store``, ``._*``, ``.fseventsd``. None of a store's names is so."""
    return name.startswith(".")


def file_system(path: Path) -> str:
    """The type of the file system that ``path`` lies on, by the system's name for it; "" where that is unknown."""
    try:
        if is_macos():
            answer = ctypes.create_string_buffer(4096)
            if ctypes.CDLL(None).statfs(os.fsencode(path), answer) != 0:
                return ""
            # `f_fstypename` of macOS's 64-bit `struct statfs`: 16 bytes at offset 72.
            return ctypes.string_at(ctypes.byref(answer, 72), 16).split(b"\0")[0].decode()
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except (OSError, ValueError, AttributeError):
        return ""
    real = os.path.realpath(path)
    over = [(len(at), kind) for at, kind in mounts if os.path.commonpath([real, at]) == at]
    return max(over, default=(0, ""), key=lambda mount: mount[0])[1]


def _version(path: Path, text: str) -> int:
    """The version that the file at ``path`` says; where it is damaged, that of the catalog beside it.

    Raises:
        StoreUnreadable: neither says one.
    """
    if text.isdecimal():
        return int(text)
    # https://www.sqlite.org/fileformat.html: `user_version` is the big-endian number at byte 60.
    with suppress(OSError), open(path.with_name("catalog.db"), "rb", opener=_open_to_read) as catalog:
        header = catalog.read(64)
        if header.startswith(b"SQLite format 3\0") and len(header) == 64:
            log.warning("%s holds %r instead of a version: that of the catalog is taken", path, text)
            # 0 where it is in the log alone; then the catalog itself is asked when it is opened.
            version = int.from_bytes(header[60:], "big") or FORMAT
            is_sealed = version == FORMAT and _has_proof(path.parent)
            return SEALED_FORMAT if is_sealed else version
    raise StoreUnreadable(f"{path} holds {text!r} instead of a version. Set another cache_dir.")


def _open_to_read(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def require_version(path: Path, version: int, newest: int = FORMAT) -> None:
    """Refuse a store of another version. ``path`` is the file in the store's folder that says its version."""
    if version > newest:
        raise StoreUnreadable(
            f"{path} says version {version}, newer than {newest}: upgrade agent-memory-mlx or set another cache_dir."
        )
    if version < OLDEST_FORMAT:
        raise StoreUnreadable(
            f"{path} says version {version}, which this agent-memory-mlx cannot read: set another cache_dir, or start "
            f"anew by deleting the old store with: cd {shlex.quote(str(path.parent))} && rm -r SCHEMA catalog.db* ns"
        )


def _require_sealed(path: Path, is_sealed: bool, wanted: int) -> None:
    """Refuse a store that is encrypted and should not be, or the other way round."""
    if is_sealed and wanted != SEALED_FORMAT:
        raise StoreUnreadable(
            f"{path.parent} is encrypted: set encryption to where its key is, 'env' or 'keyring', or set another "
            f"cache_dir."
        )
    if wanted == SEALED_FORMAT and not is_sealed:
        raise StoreUnreadable(
            f"{path.parent} is not encrypted, and is not encrypted afterwards: set another cache_dir, or go on with "
            f"encryption='off'."
        )


def _has_proof(folder: Path) -> bool:
    """Whether the file lies there that proves the master key of an encrypted store."""
    return (folder / "keys" / "store.json").exists()


def _require_readable(path: Path, text: str, wanted: int) -> None:
    folder = path.parent
    if text:
        version = _version(path, text)
        require_version(path, version, SEALED_FORMAT)
        _require_sealed(path, version == SEALED_FORMAT, wanted)
    elif any((folder / name).exists() for name in ("catalog.db", "ns")):
        # The file was lost. Files of the other kind would be taken for damaged ones.
        _require_sealed(path, _has_proof(folder), wanted)


@contextmanager
def opening(path: Path, version: int, unlock: Callable[[bool], None]) -> Iterator[None]:
    """Let one process at a time open the store whose version stands in ``path``, if it can be read.

    Args:
        path: the file with the version.
        version: of the store that is made where there is none: `FORMAT`, or `SEALED_FORMAT` for an encrypted one.
        unlock: is called first, with whether the store is new, and raises if what is there cannot be opened.
    """
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                put_aside(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnreadable(f"{path} cannot be opened: {error.strerror}. Set another cache_dir.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        _require_readable(path, text, version)
        unlock(not text)
        if not text:
            os.pwrite(fd, f"{version}\n".encode(), 0)
        yield
        if text != str(version):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{version}\n".encode(), 0)
    finally:
        os.close(fd)


@contextmanager
def reading(path: Path, version: int, unlock: Callable[[bool], None]) -> Iterator[None]:
    """Open a store that cannot be written, with the arguments of `opening`; it must be of that version."""
    try:
        text = read_small(path, 32).strip()
    except (OSError, ValueError) as error:
        raise StoreUnreadable(
            f"{path.parent} is read-only and holds no store: set another cache_dir, or None to keep nothing."
        ) from error
    if text.isdecimal():
        _require_sealed(path, int(text) == SEALED_FORMAT, version)
    if text != str(version):
        raise StoreUnreadable(
            f"{path} says {text!r} instead of version {version}, and the store cannot be brought to it because it is "
            f"read-only: set another cache_dir, or None to keep nothing."
        )
    unlock(False)
    yield


def make_dir(path: Path) -> bool:
    """Make one private folder; return whether it is new."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    # Who deleted it meanwhile saw that it was empty; whoever needs it makes it again.
    with suppress(FileNotFoundError):
        path.chmod(0o700)
    return True


def own_dir(path: Path) -> None:
    """Make one private folder of a store. Whatever else stands in its place is put aside, and stays in the store's
    folder under a hidden name."""
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            put_aside(path)
    make_dir(path)


def put_aside(path: Path) -> None:
    """Give something that stands in the way of a store a hidden name beside it."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    log.warning("%s is not what a store has there: it is now called %s", path, aside.name)
    os.rename(path, aside)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link(tmp: Path, path: Path) -> None:
    """Give ``tmp`` its final name, unless that is taken."""
    try:
        os.link(tmp, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # No hard links here. Whoever comes second replaces equal content.
        if os.path.lexists(path):
            raise FileExistsError(path) from error
        os.rename(tmp, path)


def sync(fd: int, *, barrier: bool) -> None:
    """Bring a file to the drive; with ``barrier`` it is enough that it gets there before what follows."""
    if is_macos():
        with suppress(OSError):
            fcntl.fcntl(fd, _F_BARRIERFSYNC if barrier else _F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_folder(folder: Path, *, barrier: bool) -> None:
    """Bring a folder's entries to the drive, see `sync`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd, barrier=barrier)
    finally:
        os.close(fd)
