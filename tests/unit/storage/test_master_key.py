"""The master key: where it comes from, what it may look like, and that no error shows it."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked
from support.keys import KEY, give

from agent_memory_core.errors import InvalidSetting
from agent_memory_core.storage import master_key
from agent_memory_core.storage.master_key import SERVICE, USER, read_master_key

RAW = bytes(range(200, 232))


class Ring(KeyringBackend):
    """A keyring of this process: the one of the system belongs to who runs the tests."""

    priority = 1

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise KeyringLocked("do not show this")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


@pytest.fixture
def ring() -> Iterator[Ring]:
    before = keyring.get_keyring()
    ring = Ring()
    keyring.set_keyring(ring)
    yield ring
    keyring.set_keyring(before)


@pytest.mark.parametrize(
    "text",
    [
        RAW.hex(),
        RAW.hex().upper() + "\n",
        base64.b64encode(RAW).decode(),
        base64.urlsafe_b64encode(RAW).decode(),
    ],
)
def test_a_key_is_hex_or_base64(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    give(monkeypatch, text)
    assert read_master_key("env") == RAW


@pytest.mark.parametrize("text", [None, "", "secret-word", RAW[:31].hex(), RAW.hex() + "00", "ü" * 64])
def test_anything_else_is_refused_by_the_name_of_the_variable(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    give(monkeypatch, text)
    with pytest.raises(InvalidSetting, match=r"AGENT_MEMORY_KEY.*openssl rand -hex 32") as raised:
        read_master_key("env")
    assert not text or text not in str(raised.value)
    assert raised.value.__cause__ is None


def test_the_keyring_is_asked_for_one_entry(ring: Ring) -> None:
    with pytest.raises(InvalidSetting, match=r"keyring set agent-memory 'master key'"):
        read_master_key("keyring")
    keyring.set_password(SERVICE, USER, KEY)
    assert read_master_key("keyring").hex() == KEY
    ring.locked = True
    with pytest.raises(InvalidSetting, match="KeyringLocked") as raised:
        read_master_key("keyring")
    assert "do not show" not in str(raised.value)


@pytest.mark.parametrize(
    ("package", "setting", "says"),
    [("cryptography", "env", r"\[encryption\]"), ("keyring", "keyring", r"\[keyring\]")],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, setting: str, says: str
) -> None:
    give(monkeypatch, KEY)
    monkeypatch.setattr(master_key, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(InvalidSetting, match=says):
        read_master_key(setting)
