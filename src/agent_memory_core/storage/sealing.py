"""How the content of a store is sealed at rest: AES-256-GCM with a key of its own for each namespace, or not at all.

AES-GCM (NIST SP 800-38D) by the library ``cryptography``. Every seal draws a random nonce of 96 bits, so one key may
seal 2**32 contents, far more than a namespace ever writes. What a content is (its kind, its names, the version of the
form, the namespace) is authenticated with it, so nothing that is sealed can stand in another's place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

KEY_BYTES = 32
"""Bytes of every key: AES-256."""

_NONCE_BYTES = 12
_TAG_BYTES = 16
_ID_BYTES = 8
_VERSION = "agent-memory sealed 1"


class Locked(Exception):
    """Something is not what its namespace's key has sealed, or that key is gone. It is a miss, and no damage."""


class Opener(Protocol):
    """Opens one payload in place, piece by piece."""

    def update(self, piece: memoryview) -> None:
        """Turn the next bytes into what was sealed. They may be used only after `finish`."""
        ...

    def finish(self) -> None:
        """Prove that all bytes are what was sealed.

        Raises:
            Locked: they are not.
        """
        ...


class Cipher(Protocol):
    """Seals and opens the content of one namespace. ``about`` says what a content is; only the same opens it."""

    schema: str
    """Version of a record's file, in its header."""

    def has_sealed(self, header: Mapping[str, str]) -> bool:
        """Whether a file with these fields in its header was sealed with the key that there is now.

        Raises:
            OSError: the key cannot be read now.
        """
        ...

    def fields(self) -> dict[str, str]:
        """What a header has besides for a sealed payload, with values of the right length."""
        ...

    def seal_payload(
        self, about: str, views: Sequence[memoryview]
    ) -> tuple[dict[str, str], list[memoryview]]:
        """The header's fields and the bytes to write, as many as were given.

        Raises:
            StoreError: there is no key and none can be made.
        """
        ...

    def opener(self, about: str, header: Mapping[str, str]) -> Opener:
        """What opens a payload with these fields in its header.

        Raises:
            Locked: there is no key for it.
            OSError: the key cannot be read now.
        """
        ...

    def seal(self, about: str, content: bytes) -> bytes:
        """A small content, sealed; nothing stays nothing.

        Raises:
            StoreError: there is no key and none can be made.
        """
        ...

    def open(self, about: str, sealed: bytes) -> bytes:
        """The inverse of `seal`.

        Raises:
            Locked: the key did not seal this, or is gone.
            OSError: the key cannot be read now.
        """
        ...

    def seal_text(self, about: str, text: str) -> str:
        """`seal` for a text, which stays a text.

        Raises:
            StoreError: there is no key and none can be made.
        """
        ...

    def open_text(self, about: str, sealed: str) -> str:
        """The inverse of `seal_text`.

        Raises:
            Locked: the key did not seal this, or is gone.
            OSError: the key cannot be read now.
        """
        ...


class _AsItIs:
    """Opens what was never sealed."""

    def update(self, piece: memoryview) -> None:
        """Nothing is changed."""

    def finish(self) -> None:
        """Nothing is proven."""


class Unsealed:
    """The content as it is. With the version of sealed files it can check them, but not open them."""

    def __init__(self, schema: str, fields: Mapping[str, str] | None = None) -> None:
        self.schema = schema
        self._fields = dict(fields or {})

    def has_sealed(self, header: Mapping[str, str]) -> bool:
        """Nothing is locked."""
        return True

    def fields(self) -> dict[str, str]:
        """What a header has besides."""
        return dict(self._fields)

    def seal_payload(
        self, about: str, views: Sequence[memoryview]
    ) -> tuple[dict[str, str], list[memoryview]]:
        """The same bytes."""
        return {}, list(views)

    def opener(self, about: str, header: Mapping[str, str]) -> Opener:
        """Changes nothing."""
        return _AsItIs()

    def seal(self, about: str, content: bytes) -> bytes:
        """The same bytes."""
        return content

    def open(self, about: str, sealed: bytes) -> bytes:
        """The same bytes."""
        return sealed

    def seal_text(self, about: str, text: str) -> str:
        """The same text."""
        return text

    def open_text(self, about: str, sealed: str) -> str:
        """The same text."""
        return sealed


PLAIN = Unsealed("2")
"""For a store that is not encrypted."""

SEALED_FIELDS = {
    "sealed_by": "0" * 2 * _ID_BYTES,
    "nonce": "0" * 2 * _NONCE_BYTES,
    "tag": "0" * 2 * _TAG_BYTES,
}
"""What the header of a sealed file has besides, in hex: the name of the key, which tells nothing of it, and what GCM
needs to open the payload."""

SEALED = Unsealed("3", SEALED_FIELDS)
"""For whoever checks the files of an encrypted store without their keys."""


class NamespaceCipher:
    """Seals and opens with the key of one namespace.

    Args:
        namespace: whose content it is.
        key: the key of 32 bytes, or None where there is none; called with True, it makes one instead.
    """

    schema = SEALED.schema

    def __init__(self, namespace: str, key: Callable[[bool], bytes | None]) -> None:
        self._namespace = namespace
        self._key = key

    def has_sealed(self, header: Mapping[str, str]) -> bool:
        """By the name of the key."""
        key = self._key(False)
        return key is not None and header.get("sealed_by") == key_id(key)

    def fields(self) -> dict[str, str]:
        """Where the name of the key, the nonce and the tag go."""
        return dict(SEALED_FIELDS)

    def seal_payload(
        self, about: str, views: Sequence[memoryview]
    ) -> tuple[dict[str, str], list[memoryview]]:
        """Copies of the bytes, sealed together under one nonce."""
        key = self._key(True)
        assert key is not None
        nonce = os.urandom(_NONCE_BYTES)
        encryptor = _gcm(key, nonce).encryptor()
        encryptor.authenticate_additional_data(self._said(about))
        sealed = [memoryview(bytearray(view.nbytes)) for view in views]
        for view, into in zip(views, sealed, strict=True):
            encryptor.update_into(view, into)
        encryptor.finalize()
        return {"sealed_by": key_id(key), "nonce": nonce.hex(), "tag": encryptor.tag.hex()}, sealed

    def opener(self, about: str, header: Mapping[str, str]) -> Opener:
        """Decrypts in place."""
        try:
            nonce, tag = bytes.fromhex(header["nonce"]), bytes.fromhex(header["tag"])
        except (KeyError, ValueError, TypeError) as error:
            raise Locked("its header names no nonce and no tag") from error
        if (len(nonce), len(tag)) != (_NONCE_BYTES, _TAG_BYTES):
            raise Locked("its nonce or its tag has another length")
        return _GcmOpener(self._required(), nonce, tag, self._said(about))

    def seal(self, about: str, content: bytes) -> bytes:
        """The nonce, then the content, then the tag."""
        if not content:
            return content
        key = self._key(True)
        assert key is not None
        return seal(key, self._said(about), content)

    def open(self, about: str, sealed: bytes) -> bytes:
        """What `seal` was given."""
        return unseal(self._required(), self._said(about), sealed) if sealed else sealed

    def seal_text(self, about: str, text: str) -> str:
        """What `seal` makes of it, in hex."""
        return self.seal(about, text.encode()).hex()

    def open_text(self, about: str, sealed: str) -> str:
        """What `seal_text` was given."""
        try:
            content = bytes.fromhex(sealed)
        except ValueError as error:
            raise Locked("it was not sealed") from error
        return self.open(about, content).decode()

    def _required(self) -> bytes:
        key = self._key(False)
        if key is None:
            raise Locked("the key of its namespace is gone")
        return key

    def _said(self, about: str) -> bytes:
        return f"{_VERSION}\n{len(self._namespace)}\n{self._namespace}\n{about}".encode()


class _GcmOpener:
    def __init__(self, key: bytes, nonce: bytes, tag: bytes, said: bytes) -> None:
        self._decryptor = _gcm(key, nonce).decryptor()
        self._decryptor.authenticate_additional_data(said)
        self._tag = tag

    def update(self, piece: memoryview) -> None:
        """Decrypt the next bytes in place."""
        self._decryptor.update_into(piece, piece)

    def finish(self) -> None:
        """Compare the tag."""
        from cryptography.exceptions import InvalidTag

        try:
            self._decryptor.finalize_with_tag(self._tag)
        except InvalidTag:
            raise Locked("its namespace's key has not sealed it") from None


def key_id(key: bytes) -> str:
    """A name for a random key, which tells nothing of it."""
    return hashlib.sha256(b"agent-memory key id 1" + key).digest()[:_ID_BYTES].hex()


class NameCipher:
    """Seals the names of records: what has 32 bytes keeps them, and one name is always sealed alike.

    AES of each half (ECB). A name is a sha256 digest, so no half ever comes twice in two names, and for such inputs a
    block cipher gives nothing away but which names are equal.

    Args:
        key: any 32 random bytes; the key of the names is derived from them.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher as Aes, algorithms, modes

        self._aes = Aes(algorithms.AES(hashlib.sha256(b"agent-memory names 1" + key).digest()), modes.ECB())

    def hide(self, name: bytes) -> bytes:
        """A name, sealed."""
        return self._aes.encryptor().update(name)

    def show(self, name: bytes) -> bytes:
        """The inverse of `hide`."""
        return self._aes.decryptor().update(name)


def seal(key: bytes, said: bytes, content: bytes) -> bytes:
    """A random nonce, then the content encrypted, then the tag, which also covers ``said``."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, said)


def unseal(key: bytes, said: bytes, sealed: bytes) -> bytes:
    """The inverse of `seal`.

    Raises:
        Locked: it was sealed by another key or as something else, or was changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if len(sealed) < _NONCE_BYTES + _TAG_BYTES:
        raise Locked("it is too short")
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], said)
    except InvalidTag:
        raise Locked("another key has sealed it") from None


def _gcm(key: bytes, nonce: bytes) -> Any:
    # Imported here, because an optional extra brings it.
    from cryptography.hazmat.primitives.ciphers import Cipher as Aes, algorithms, modes

    return Aes(algorithms.AES(key), modes.GCM(nonce))
