"""What macOS alone needs: purgeable space, folders that are synced with a cloud, and backups that leave a store out.

All of it asks system libraries through ctypes. Where one of them is not there or refuses, the answer is the one for a
system that knows nothing of the matter, and nothing fails.
"""

from __future__ import annotations

import ctypes
import os
import plistlib
import sys
from collections.abc import Callable
from pathlib import Path

CORE_FOUNDATION = "/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation"

_SINT64 = 4
_SF_DATALESS = 0x40000000
_XATTR_NOFOLLOW = 1

_EXCLUSION = b"com.apple.metadata:com_apple_backup_excludeItem"
_EXCLUDED = plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)

_CLOUD_FOLDERS = ("Library/Mobile Documents", "Library/CloudStorage")
"""Below the home folder: where iCloud Drive lies, and where the clouds of others do."""


def purgeable_free_bytes(path: Path) -> int:
    """Bytes that the system would make free on the volume of ``path`` for something important; 0 if it cannot tell.

    This is what the Finder calls available: free blocks, and what caches and snapshots of Time Machine would give back.
    """

    def number(library: ctypes.CDLL, value: ctypes.c_void_p) -> int:
        found = ctypes.c_int64()
        library.CFNumberGetValue.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
        library.CFNumberGetValue(value, _SINT64, ctypes.byref(found))
        return found.value

    return _resource(path, "kCFURLVolumeAvailableCapacityForImportantUsageKey", number)


def syncing_cloud(path: Path) -> str:
    """The cloud that keeps ``path`` or a folder above it in step with other machines; "" if none is known to."""
    if not is_macos():
        return ""
    if any(path.is_relative_to(Path.home() / folder) for folder in _CLOUD_FOLDERS):
        return "iCloud or another cloud"
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if any(getattr(os.stat(folder), "st_flags", 0) & _SF_DATALESS for folder in (there, *there.parents)):
        return "a cloud that has already taken content away"

    def truth(library: ctypes.CDLL, value: ctypes.c_void_p) -> int:
        library.CFBooleanGetValue.argtypes = [ctypes.c_void_p]
        library.CFBooleanGetValue.restype = ctypes.c_ubyte
        return int(library.CFBooleanGetValue(value))

    # The Desktop and the Documents folder lie in their usual places, whether they are synced or not.
    return "iCloud" if _resource(there, "kCFURLIsUbiquitousItemKey", truth) else ""


def exclude_from_backup(path: Path) -> bool:
    """Let Time Machine leave a folder out; return whether the system took the wish."""
    if not is_macos():
        return False
    try:
        set_attribute = _libc().setxattr
    except (OSError, AttributeError):
        return False
    set_attribute.argtypes = [
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
        *(ctypes.c_uint32, ctypes.c_int),
    ]
    answer = set_attribute(os.fsencode(path), _EXCLUSION, _EXCLUDED, len(_EXCLUDED), 0, _XATTR_NOFOLLOW)
    return bool(answer == 0)


def is_macos() -> bool:
    """Whether this is macOS. A function, because a type checker takes code after a plain comparison for unreachable."""
    return sys.platform == "darwin"


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _resource(path: Path, key: str, convert: Callable[[ctypes.CDLL, ctypes.c_void_p], int]) -> int:
    """A property of the file system at ``path``, which exists, as a number; 0 where it cannot be had."""
    if not is_macos():
        return 0
    try:
        library = ctypes.CDLL(CORE_FOUNDATION)
        name = ctypes.c_void_p.in_dll(library, key)
        make_url, copy_property = (
            library.CFURLCreateFromFileSystemRepresentation,
            library.CFURLCopyResourcePropertyForKey,
        )
        release = library.CFRelease
    except (OSError, AttributeError, ValueError):
        return 0
    make_url.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_ubyte]
    make_url.restype = ctypes.c_void_p
    copy_property.argtypes = [ctypes.c_void_p] * 4
    copy_property.restype = ctypes.c_ubyte
    release.argtypes = [ctypes.c_void_p]
    raw = os.fsencode(path)
    url = make_url(None, raw, len(raw), True)
    if not url:
        return 0
    value = ctypes.c_void_p()
    try:
        if not copy_property(url, name, ctypes.byref(value), None) or value.value is None:
            return 0
        try:
            return convert(library, value)
        finally:
            release(value)
    finally:
        release(url)
