"""Sealing: only the same key opens a content, as the same thing, unchanged."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from agent_memory_core.storage.sealing import PLAIN, SEALED, Cipher, Locked, NameCipher, NamespaceCipher

KEY, OTHER = bytes(range(32)), bytes(32)


def cipher(key: bytes | None = KEY, namespace: str = "ada") -> NamespaceCipher:
    return NamespaceCipher(namespace, lambda make: key)


def opened(by: Cipher, about: str, header: dict[str, str], views: Sequence[memoryview]) -> bytes:
    opener = by.opener(about, header)
    for view in views:
        opener.update(view)
    opener.finish()
    return b"".join(views)


@given(st.binary(), st.text())
def test_what_was_sealed_opens_and_is_not_to_be_seen(content: bytes, text: str) -> None:
    sealed = cipher().seal("a", content)
    assert cipher().open("a", sealed) == content
    assert len(sealed) == (len(content) + 28 if content else 0)
    assert len(content) < 8 or content not in sealed
    assert cipher().open_text("a", cipher().seal_text("a", text)) == text


@given(st.lists(st.binary(max_size=5000), max_size=4))
def test_a_payload_opens_in_place_whatever_its_pieces(parts: list[bytes]) -> None:
    header, views = cipher().seal_payload("a", [memoryview(part) for part in parts])
    assert {name: len(value) for name, value in header.items()} == {
        name: len(value) for name, value in cipher().fields().items()
    }
    assert [view.nbytes for view in views] == [len(part) for part in parts]
    assert opened(cipher(), "a", header, views) == b"".join(parts)


@pytest.mark.parametrize(
    "other",
    [cipher(OTHER), cipher(None), cipher(namespace="adb")],
    ids=["another key", "no key", "another namespace"],
)
def test_nobody_else_opens_it(other: NamespaceCipher) -> None:
    sealed = cipher().seal("a", b"content")
    with pytest.raises(Locked):
        other.open("a", sealed)
    header, views = cipher().seal_payload("a", [memoryview(b"content")])
    with pytest.raises(Locked):
        opened(other, "a", header, views)


def test_it_opens_as_nothing_else() -> None:
    with pytest.raises(Locked):
        cipher().open("b", cipher().seal("a", b"content"))
    with pytest.raises(Locked):
        opened(cipher(), "b", *cipher().seal_payload("a", [memoryview(b"content")]))


@given(st.integers(0, 34))
def test_a_changed_byte_locks_it(at: int) -> None:
    sealed = bytearray(cipher().seal("a", b"content"))
    sealed[at] ^= 1
    with pytest.raises(Locked):
        cipher().open("a", bytes(sealed))


@pytest.mark.parametrize("header", [{}, {"nonce": "00", "tag": "00"}, {"nonce": "x", "tag": "x"}])
def test_a_header_without_a_nonce_locks_it(header: dict[str, str]) -> None:
    with pytest.raises(Locked):
        cipher().opener("a", header)


@pytest.mark.parametrize("text", ["not hex", "00"])
def test_a_text_that_was_not_sealed_is_locked(text: str) -> None:
    with pytest.raises(Locked):
        cipher().open_text("a", text)


def test_no_nonce_is_used_twice() -> None:
    nonces = {cipher().seal("a", b"content")[:12] for _ in range(1000)}
    nonces |= {bytes.fromhex(cipher().seal_payload("a", [])[0]["nonce"]) for _ in range(1000)}
    assert len(nonces) == 2000


def test_what_is_not_sealed_stays_as_it_is() -> None:
    content = os.urandom(9)
    for plain in (PLAIN, SEALED):
        assert plain.open("a", plain.seal("a", content)) == content
        assert plain.open_text("a", plain.seal_text("a", "text")) == "text"
        assert opened(plain, "a", *plain.seal_payload("a", [memoryview(content)])) == content


def test_a_cipher_does_not_show_its_key() -> None:
    assert KEY.hex() not in repr(cipher())
    assert repr(KEY) not in repr(vars(cipher()))


@given(st.binary(min_size=32, max_size=32))
def test_a_name_is_hidden_in_as_many_bytes_and_shown_again(name: bytes) -> None:
    names = NameCipher(KEY)
    hidden = names.hide(name)
    assert names.show(hidden) == name
    assert hidden == NameCipher(KEY).hide(name)
    assert len(hidden) == len(name)
    assert name not in (hidden, NameCipher(OTHER).show(hidden))
