"""The master key of encrypted stores: 32 bytes from the environment or from the keyring of the operating system."""

from __future__ import annotations

import base64
import binascii
import os
from importlib.util import find_spec

from agent_memory_core.config import Encryption
from agent_memory_core.environment import KEY_VARIABLE
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.storage.sealing import KEY_BYTES

SERVICE, USER = "agent-memory", "master key"
"""Under which names the keyring has the key."""

_FORM = "32 random bytes as 64 hex digits or as base64"
_NEW = "openssl rand -hex 32"


def source_name(encryption: Encryption) -> str:
    """Where a master key comes from, in words."""
    return KEY_VARIABLE if encryption == "env" else f"the keyring's entry {SERVICE!r}, {USER!r}"


def read_master_key(encryption: Encryption) -> bytes:
    """The master key that a setting names. It is read anew for every store that is opened.

    Raises:
        InvalidSetting: a package is missing, or there is no key, or it has not this form. Never names the key.
    """
    if find_spec("cryptography") is None:
        raise InvalidSetting(
            f"encryption={encryption!r} needs cryptography: pip install 'agent-memory-mlx[encryption]'"
        )
    if encryption == "env":
        text, put = os.environ.get(KEY_VARIABLE), f"set {KEY_VARIABLE} to {_FORM}, as {_NEW} prints them"
    else:
        text, put = _from_keyring(), f"put {_FORM} there with: keyring set {SERVICE} {USER!r}"
    if not text:
        raise InvalidSetting(
            f"encryption={encryption!r}: there is no key in {source_name(encryption)}: {put}."
        )
    key = _decoded(text.strip())
    if key is None:
        raise InvalidSetting(
            f"encryption={encryption!r}: what is in {source_name(encryption)} is no key: {put}."
        )
    return key


def _from_keyring() -> str | None:
    if find_spec("keyring") is None:
        raise InvalidSetting("encryption='keyring' needs keyring: pip install 'agent-memory-mlx[keyring]'")
    import keyring
    from keyring.errors import KeyringError

    try:
        return keyring.get_password(SERVICE, USER)
    except KeyringError as error:
        raise InvalidSetting(
            f"encryption='keyring': the keyring cannot be read ({type(error).__name__}): unlock it, or use "
            f"encryption='env'."
        ) from None


def _decoded(text: str) -> bytes | None:
    """The key that a text stands for, if it is one."""
    for decode in (bytes.fromhex, _from_base64):
        try:
            key = decode(text)
        except (ValueError, binascii.Error):
            continue
        if len(key) == KEY_BYTES:
            return key
    return None


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
