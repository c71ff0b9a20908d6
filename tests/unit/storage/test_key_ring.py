"""An encrypted store: its keys, what they refuse, and what a wrong one costs, which is time and never data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.keys import KEY, OTHER_KEY, contents, give, where
from support.stored_turns import MANY, ROOT, allocate, content, files, ids, is_whole, path_of, records, turn

from agent_memory_core.blocks.block import BlockHash, pack_tokens, root_hash
from agent_memory_core.config import Encryption
from agent_memory_core.errors import StoreError, StoreUnreadable
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.chat_history import ChatHistory
from agent_memory_core.storage.folder import FORMAT, SEALED_FORMAT
from agent_memory_core.storage.key_ring import KeyRing
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.sealing import Locked

TOKENS = ids(11, 123456)
ROOTS = {name: root_hash({"namespace": name}) for name in ("ada", "bob")}


@pytest.fixture(autouse=True)
def master(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, KEY)


def open_sealed(path: Path, encryption: Encryption = "env") -> BlockStore:
    store = BlockStore(path, quota_bytes=MANY, encryption=encryption)
    for name, root in ROOTS.items():
        store.identify(root, {"namespace": name}, name)
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    store = open_sealed(tmp_path / "store")
    for name, root in ROOTS.items():
        turn(store, TOKENS, root=root, namespace=name, lane="reviewer of canaries")
    yield store
    store.close()


def ring(store: BlockStore) -> KeyRing:
    assert isinstance(store.keys, KeyRing)
    return store.keys


def key_of(store: BlockStore, name: str = "ada") -> bytes:
    key = ring(store)._key(name, False)
    assert key is not None
    return key


def tokens(store: BlockStore, name: str) -> list[tuple[int, ...]]:
    return [store.catalog.branches.tokens(row) for row in store.catalog.branches.of_session(name, "s")]


def test_all_of_it_can_be_read_again_after_a_restart(store: BlockStore) -> None:
    for again in (store, open_sealed(store.path)):
        assert [tokens(again, name) for name in ROOTS] == [[TOKENS], [TOKENS]]
        assert all(is_whole(again, TOKENS, root) for root in ROOTS.values())
        assert again.catalog.branches.of_session("ada", "s")[0].lane == "reviewer of canaries"
        assert again.check().clean


def test_nothing_of_it_is_in_the_files(store: BlockStore, tmp_path: Path) -> None:
    """Token ids, the label of a lane, payloads and transcripts: in a plain store the same search finds each."""
    plain = BlockStore(tmp_path / "plain", quota_bytes=MANY)
    plain.identify(ROOTS["ada"], {"namespace": "ada"}, "ada")
    turn(plain, TOKENS, root=ROOTS["ada"], namespace="ada", lane="reviewer of canaries")
    for each in (plain, store):
        each.history("ada", "s").write([{"role": "user", "content": "a canary sings"}])
    canaries = [pack_tokens(TOKENS[:4]), b"reviewer of canaries", b"a canary sings"]
    for made in records(TOKENS, ROOTS["ada"]):
        # Also a name: with that of its parent it tells the tokens to who tries them.
        canaries += [content(made.key)[:64], made.key, made.key.hex().encode()]
    for canary in canaries:
        assert where(plain.path, canary)
        assert not where(store.path, canary)
    plain.close()


def test_the_history_of_a_chat_opens_for_its_session_only(store: BlockStore) -> None:
    history = [{"role": "user", "content": "hello"}]
    store.history("ada", "s").write(history)
    assert store.history("ada", "s").read() == history
    mine, its = store.history("ada", "s")._file, store.history("bob", "s")._file
    shutil.copy(mine, its)
    assert store.history("bob", "s").read() == []
    with pytest.raises(StoreError, match="cannot be read"):
        ChatHistory(store.path, "ada", "s").read()


# -- the master key --------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused_by_name_and_nothing_is_touched(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    (store.path / "tmp" / "999999.left").write_bytes(b"left by a process that was killed")
    before = contents(store.path)
    give(monkeypatch, OTHER_KEY)
    with pytest.raises(StoreUnreadable, match="AGENT_MEMORY_KEY is not the key") as raised:
        open_sealed(store.path)
    assert OTHER_KEY not in str(raised.value)
    with pytest.raises(StoreUnreadable, match="is encrypted: set encryption"):
        open_sealed(store.path, "off")
    assert contents(store.path) == before
    give(monkeypatch, KEY)
    assert is_whole(open_sealed(store.path), TOKENS, ROOTS["ada"])


def test_a_store_that_is_not_encrypted_is_not_mixed_with_one_that_is(tmp_path: Path) -> None:
    plain = open_sealed(tmp_path / "store", "off")
    turn(plain, TOKENS, root=ROOTS["ada"], namespace="ada")
    plain.close()
    before = contents(plain.path)
    with pytest.raises(StoreUnreadable, match="is not encrypted"):
        open_sealed(plain.path)
    assert contents(plain.path) == before
    assert is_whole(open_sealed(plain.path, "off"), TOKENS, ROOTS["ada"])


@pytest.mark.parametrize("lost", [["SCHEMA"], ["SCHEMA", "catalog.db"]])
@pytest.mark.parametrize("setting", ["off", "env"])
def test_what_a_store_is_outlives_the_file_with_its_version(
    tmp_path: Path, setting: Encryption, lost: list[str]
) -> None:
    store = open_sealed(tmp_path / "store", setting)
    turn(store, TOKENS, root=ROOTS["ada"], namespace="ada")
    store.close()
    for name in lost:
        (store.path / name).unlink()
    with pytest.raises(StoreUnreadable, match="is encrypted" if setting == "env" else "is not encrypted"):
        open_sealed(store.path, "off" if setting == "env" else "env")
    again = open_sealed(store.path, setting)
    assert is_whole(again, TOKENS, ROOTS["ada"])
    again.close()


def test_a_program_that_knows_no_encryption_refuses_the_store(store: BlockStore) -> None:
    """It reads no version beyond its own, and says of a newer one what to do."""
    assert (store.path / "SCHEMA").read_text() == f"{SEALED_FORMAT}\n"
    assert SEALED_FORMAT > FORMAT


@pytest.mark.parametrize("broken", [None, "", "{}", '{"key": 1}', '{"key": "00"}', "[" * 9999])
def test_a_lost_or_broken_proof_of_the_key_is_refused(store: BlockStore, broken: str | None) -> None:
    store.close()
    proof = store.path / "keys" / "store.json"
    if broken is None:
        proof.unlink()
    else:
        proof.write_text(broken)
    before = contents(store.path)
    with pytest.raises(StoreUnreadable, match="bring keys/ back" if broken is None else "is not the key"):
        open_sealed(store.path)
    assert contents(store.path) == before


def test_keys_are_private_and_shown_nowhere(store: BlockStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = key_of(store)
    for shown in (key, bytes.fromhex(KEY)):
        for form in (shown, shown.hex().encode(), repr(shown).encode()):
            assert not where(store.path, form)
            assert form.decode("latin-1") not in repr(store.keys) + repr(store.keys.of("ada")) + caplog.text
    assert {path.stat().st_mode & 0o777 for path in (store.path / "keys").iterdir()} == {0o600}


# -- the key of a namespace ------------------------------------------------------------------------------------


def test_forgetting_a_namespace_deletes_its_key_and_leaves_the_others(store: BlockStore) -> None:
    sealed = {path: path.read_bytes() for path in files(store)}
    other = open_sealed(store.path)
    assert is_whole(other, TOKENS, ROOTS["ada"])
    store.forget("ada", "s")
    store.forget_namespace("ada")
    assert len(list((store.path / "keys").iterdir())) == 2
    assert tokens(store, "ada") == []
    assert (tokens(store, "bob"), is_whole(store, TOKENS, ROOTS["bob"])) == ([TOKENS], True)
    # Its files as a backup has them, with rows that describe them: nobody opens them, also who knew the key.
    turn(store, TOKENS, root=ROOTS["ada"], namespace="ada")
    assert is_whole(store, TOKENS, ROOTS["ada"])
    assert is_whole(other, TOKENS, ROOTS["ada"])
    for path, raw in sealed.items():
        assert ROOTS["ada"].hex() not in str(path) or path.read_bytes() != raw
    other.close()


def lose_key(store: BlockStore, name: str) -> None:
    store.keys.forget(name)


def give_key_of_another(store: BlockStore, name: str) -> None:
    (other,) = ROOTS.keys() - {name}
    shutil.copy(ring(store)._file(other), ring(store)._file(name))


def break_key(store: BlockStore, name: str) -> None:
    ring(store)._file(name).write_text("{")


@pytest.mark.parametrize("harm", [lose_key, give_key_of_another, break_key])
def test_what_does_not_open_is_a_miss_and_is_computed_again(
    store: BlockStore, harm: Callable[[BlockStore, str], None]
) -> None:
    harm(store, "ada")
    assert tokens(store, "ada") == [()]
    assert store.catalog.branches.of_session("ada", "s")[0].lane == ""
    first = records(TOKENS, ROOTS["ada"])[0]
    assert store.load(ROOTS["ada"], first.key, allocate) is None
    assert (store.stats()["miss_locked"], store.stats()["miss_damaged"]) == (1, 0)
    assert store.stats()["quarantined"] == 0
    assert is_whole(store, TOKENS, ROOTS["bob"])
    for made in records(TOKENS, ROOTS["ada"]):
        store.load(ROOTS["ada"], made.key, allocate)
    turn(store, TOKENS, root=ROOTS["ada"], namespace="ada")
    again = open_sealed(store.path)
    assert is_whole(again, TOKENS, ROOTS["ada"])
    assert TOKENS in tokens(again, "ada")
    assert again.check().clean
    again.close()


def test_a_file_that_another_key_has_sealed_is_replaced_where_it_is_in_the_way(store: BlockStore) -> None:
    made = records(TOKENS, ROOTS["ada"])[0]
    path = path_of(store, ring(store).hide(made.key))
    old = path.read_bytes()
    row = store.catalog.records.get(ring(store).hide(made.key))
    assert row is not None
    store.keys.forget("ada")
    written = store.files.write(row, made, store.keys.of("ada"))
    assert path.read_bytes() != old
    assert written.checksum != row.checksum
    assert list((store.path / "quarantine").iterdir()) == []


def relabelled(raw: bytes, to: dict[str, str]) -> bytes:
    """A record's file whose header says something else and is consistent in itself."""
    from agent_memory_core.storage.block_file import _digest_of

    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    metadata = table.pop("__metadata__") | to
    del metadata["header_xxh3_128"]
    metadata["header_xxh3_128"] = _digest_of(metadata, table)
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    return raw[:8] + text.ljust(length) + raw[8 + length :]


def stored(store: BlockStore, name: str) -> list[StoredRecord]:
    """How the catalog describes the blocks of a namespace."""
    hidden = [ring(store).hide(made.key) for made in records(TOKENS, ROOTS[name])]
    return [store.catalog.records.get_many(hidden)[key] for key in hidden]


def test_a_file_in_anothers_place_is_a_miss_however_well_it_is_labelled(store: BlockStore) -> None:
    mine, its = (stored(store, name)[0] for name in ("ada", "bob"))
    raw = path_of(store, its.key).read_bytes()
    names = {"root": ROOTS["ada"].hex(), "key": mine.key.hex(), "parent": mine.parent.hex()}
    path = path_of(store, mine.key)
    for forged in (raw, relabelled(raw, names)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(forged)
        row = store.catalog.records.get(mine.key)
        if row is None:
            row = replace(its, key=mine.key, parent=mine.parent, root=ROOTS["ada"])
            store.catalog.records.put(row, 0, 0)
        else:
            store.catalog.records.put(replace(row, checksum=its.checksum), 0, 0)
        assert store.load(ROOTS["ada"], ring(store).show(mine.key), allocate) is None
    assert (store.stats()["miss_damaged"], store.stats()["miss_locked"]) == (1, 1)


def test_rows_in_anothers_place_have_no_tokens(store: BlockStore) -> None:
    (mine, other), (its, _) = ([made.key for made in stored(store, name)][:2] for name in ("ada", "bob"))
    for source in (its, other):
        with store.catalog.transaction() as db:
            db.execute(
                "UPDATE records SET tokens = (SELECT tokens FROM records WHERE key = ?) WHERE key = ?",
                (source, mine),
            )
        found = store.catalog.records.get(mine)
        assert found is not None
        assert found.tokens == ()


def test_a_key_that_cannot_be_read_now_costs_a_turn_and_deletes_nothing(store: BlockStore) -> None:
    file = ring(store)._file("ada")
    made = records(TOKENS, ROOTS["ada"])[0]
    file.rename(file.with_suffix(".kept"))
    file.symlink_to(file.with_suffix(".kept"))
    assert store.load(ROOTS["ada"], made.key, allocate) is None
    assert store.stats()["miss_failed"] == 1
    with pytest.raises(StoreError, match="the key in"):
        turn(store, ids(20), root=ROOTS["ada"], namespace="ada")
    file.unlink()
    file.with_suffix(".kept").rename(file)
    assert is_whole(store, TOKENS, ROOTS["ada"])


def test_a_lost_catalog_is_made_anew_and_its_blocks_open(store: BlockStore) -> None:
    store.close()
    for file in store.path.glob("catalog.db*"):
        file.unlink()
    again = open_sealed(store.path)
    assert is_whole(again, TOKENS, ROOTS["ada"])
    again.close()


def test_a_store_that_was_deleted_while_it_was_open_is_encrypted_again(store: BlockStore) -> None:
    shutil.rmtree(store.path)
    turn(store, TOKENS, root=ROOTS["ada"], namespace="ada")
    assert is_whole(open_sealed(store.path), TOKENS, ROOTS["ada"])
    assert not where(store.path, pack_tokens(TOKENS[:4]))


# -- processes -------------------------------------------------------------------------------------------------

_FIRST_USE = """
import os, signal, sys
from pathlib import Path
from agent_memory_core.storage import key_ring
calls = 0
def counted(name):
    real = getattr(key_ring, name)
    def call(*args, **more):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    setattr(key_ring, name, call)
ring = key_ring.KeyRing(Path(sys.argv[1]), "env")
for name in ("own_dir", "seal", "_write", "sync", "link", "sync_folder"):
    counted(name)
ring.of("ada").seal("a", b"content")
print("sealed")
"""


def test_a_kill_in_the_middle_of_making_a_key_leaves_a_whole_one_or_none(tmp_path: Path) -> None:
    open_sealed(tmp_path / "store").close()
    outcomes = set()
    for step in range(1, 10):
        path = tmp_path / str(step)
        shutil.copytree(tmp_path / "store", path)
        done = subprocess.run(
            [sys.executable, "-c", _FIRST_USE, str(path), str(step)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        store = open_sealed(path)
        made = ring(store)._file("ada").exists()
        outcomes.add((done.returncode, made))
        assert list((path / "tmp").iterdir()) == []
        turn(store, TOKENS, root=ROOTS["ada"], namespace="ada")
        store.close()
        again = open_sealed(path)
        assert is_whole(again, TOKENS, ROOTS["ada"])
        again.close()
    assert outcomes == {(-signal.SIGKILL, False), (-signal.SIGKILL, True), (0, True)}


def test_processes_that_make_the_same_key_agree_on_one(tmp_path: Path) -> None:
    store = open_sealed(tmp_path / "store")
    started = [
        subprocess.Popen([sys.executable, "-c", _FIRST_USE, str(store.path), "0"], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    store.keys.of("ada").seal("a", b"content")
    key = key_of(store)
    assert [process.communicate()[0] for process in started] == [b"sealed\n"] * 3
    assert key_of(open_sealed(store.path)) == key


def test_a_sealed_name_cannot_be_asked_of_a_root_that_nobody_registered(store: BlockStore) -> None:
    unknown: BlockHash = root_hash({"namespace": "nobody"})
    with pytest.raises(Locked):
        store.catalog.records.cipher(unknown).open("a", os.urandom(40))
    assert unknown != ROOT
