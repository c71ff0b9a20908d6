"""The page about the format: what a real store has is there, and its records are named and described as it says."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import xxhash
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from safetensors import safe_open
from support.keys import KEY, give

from agent_memory_core import AgentMemory
from agent_memory_core.storage.block_file import ALIGNMENT
from agent_memory_core.storage.folder import FORMAT
from agent_memory_core.storage.sealing import PLAIN

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "store"
    with AgentMemory(cache_dir=folder, min_free_mb=0, block_tokens=64) as memory:
        memory.chat("Tell me of Ada. " * 20, "ada", max_tokens=2)
    return folder


def test_the_versions_are_those_of_the_code(store: Path) -> None:
    assert f"Its version is {FORMAT}." in PAGE
    assert f"the version of the file: {PLAIN.schema}" in PAGE
    assert f"{ALIGNMENT:,}" in PAGE
    assert (store / "SCHEMA").read_text().strip() == str(FORMAT)


@pytest.fixture(scope="module")
def sealed_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "sealed"
    with pytest.MonkeyPatch.context() as patch:
        give(patch, KEY)
        with AgentMemory(cache_dir=folder, min_free_mb=0, block_tokens=64, encryption="env") as memory:
            memory.chat("Tell me of Ada. " * 20, "ada", max_tokens=2)
    return folder


@pytest.mark.parametrize("which", ["store", "sealed_store"])
def test_everything_in_a_store_is_on_the_page(which: str, request: pytest.FixtureRequest) -> None:
    store: Path = request.getfixturevalue(which)
    hexes = "[0-9a-f]{64}"
    listed = PAGE.split("```text\n")[1].split("```")[0]
    patterns = {
        re.escape(word)
        .replace("<root>", hexes)
        .replace("<key>", hexes)
        .replace("<namespace>", hexes)
        .replace("<hh>", "[0-9a-f]{2}")
        .replace("<process>\\.<random>", ".*")
        for line in listed.splitlines()
        for word in re.split(r"\s{2,}", line)[:-1]
    }
    for path in store.rglob("*"):
        name = path.relative_to(store).as_posix()
        if path.is_file():
            assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_records_are_named_and_described_as_the_page_says(store: Path) -> None:
    paths = sorted(store.glob("ns/*/*/*/*.safetensors"))
    named = set(
        re.findall(
            r"`(\w+)`", "".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
        )
    )
    assert paths
    for path in paths:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert (8 + length) % ALIGNMENT == 0
        header = json.loads(raw[8 : 8 + length])
        metadata = header.pop("__metadata__")
        assert set(metadata) == named
        assert metadata["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw[8 + length :])
        assert (metadata["key"], metadata["root"]) == (path.stem, path.parts[-4])
        with safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == set(header)


def test_a_root_is_the_hash_of_its_identity(store: Path) -> None:
    (path,) = store.glob("ns/*/identity.json")
    content = json.loads(path.read_text())
    identity = {name: value for name, value in content["identity"].items() if name != "name"}
    digest = hashlib.sha256(b"agent-memory root 1")
    for name in sorted(identity):
        for part in (name.encode(), identity[name].encode()):
            digest.update(struct.pack("<I", len(part)) + part)
    assert digest.hexdigest() == path.parent.name


def unsealed(key: bytes, sealed: bytes, *said: str) -> bytes:
    return AESGCM(key).decrypt(sealed[:12], sealed[12:], "\n".join(said).encode())


def test_an_encrypted_store_opens_by_what_the_page_says(store: Path, sealed_store: Path) -> None:
    """Written from the page alone; the plain store, which is written first, has the same records."""
    keys = {}
    for path in (sealed_store / "keys").iterdir():
        said = json.loads(path.read_text())
        keys[said["of"]] = unsealed(
            bytes.fromhex(KEY), bytes.fromhex(said["key"]), "agent-memory key 1", said["of"]
        )
    names = hashlib.sha256(b"agent-memory names 1" + keys["store"]).digest()
    seen = 0
    for plain in store.glob("ns/*/*/*/*.safetensors"):
        encryptor = Cipher(AES(names), modes.ECB()).encryptor()
        name = encryptor.update(bytes.fromhex(plain.stem)).hex()
        (path,) = sealed_store.glob(f"ns/{plain.parts[-4]}/{plain.parts[-3]}/{name[:2]}/{name}.safetensors")
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:start])
        about = table.pop("__metadata__")
        record = [about["kind"], about["root"], about["key"], about["parent"], int(about["ntok"])]
        tensors = [[tensor, entry["dtype"], entry["shape"]] for tensor, entry in table.items()]
        opened = unsealed(
            keys["namespace default"],
            bytes.fromhex(about["nonce"]) + raw[start:] + bytes.fromhex(about["tag"]),
            *("agent-memory sealed 1", "7", "default", json.dumps([record, tensors])),
        )
        assert opened == plain.read_bytes()[start:]
        assert about["schema"] == "3"
        named = hashlib.sha256(b"agent-memory key id 1" + keys["namespace default"]).hexdigest()
        assert about["sealed_by"] == named[:16]
        seen += 1
    assert seen >= 2
