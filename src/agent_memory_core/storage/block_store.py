"""The disk tier: commits turns, loads records, keeps to the quota. Records are files, found through the catalog.

A turn is written in this order: reserve its bytes, write each file under a temporary name, link it to its own name,
then one transaction in the catalog. So the catalog never names bytes that are not there, and a process that is killed
leaves at most temporary files and sound files that the catalog does not know yet. A file is deleted only after its
row, and only while this process holds the catalog's write lock, so that no other process can begin to rely on it.

A file is used only if its header says exactly what the catalog says and its payload has the checksum. What is proven
to be damaged moves to ``quarantine/`` and is a miss. A fault that may pass (too many open files, an input error) is
only a miss.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from agent_memory_core.blocks.block import BlockHash, record_hash
from agent_memory_core.config import Durability, Encryption, EngineConfig
from agent_memory_core.errors import SessionNotFound, StoreError, StoreFull
from agent_memory_core.storage.audit import CheckReport, check
from agent_memory_core.storage.block_file import describe_new
from agent_memory_core.storage.branches import BranchCommit, BranchRow, SessionOwner, hidden
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.chat_history import ChatHistory
from agent_memory_core.storage.commit_plan import CommitPlan, bytes_of
from agent_memory_core.storage.disk_budget import Limits
from agent_memory_core.storage.folder import opening, prepare_root, reading
from agent_memory_core.storage.key_ring import keys_for
from agent_memory_core.storage.mirror import NoMirror, StoreMirror, mirrored
from agent_memory_core.storage.reconcile import Reconciler
from agent_memory_core.storage.record import Allocate, HostTensor, Record, StoredRecord
from agent_memory_core.storage.record_files import NO_SPACE, RecordFiles
from agent_memory_core.storage.record_reader import Counts, RecordReader
from agent_memory_core.storage.recovery import open_catalog, reopen_catalog
from agent_memory_core.storage.tier import StoredTier
from agent_memory_core.storage.volume import Mark, Volume, default_quota

log = logging.getLogger("agent_memory")

T = TypeVar("T")

_ATTEMPTS = 3
_DELETE_AT_ONCE = 128
_FORGETTING = "forgetting "
_TRYING = "trying to write"
_LOG_DIVISOR = 64

_COUNTERS = ("evicted", "miss_unknown", "miss_gone", "miss_damaged", "miss_locked", "miss_failed")
_MIB = 2**20


class BlockStore:
    """One store on disk. Any thread may call it.

    One that cannot be written is read; every commit raises StoreError then.

    Args:
        path: its folder, which is made if it does not exist.
        quota_bytes: most bytes of all that lies there; None is the lesser of 20 GiB and a tenth of the volume.
        namespace_quota_bytes: most bytes of the records of one namespace; None sets no limit of its own.
        min_free_bytes: bytes of the volume that it leaves free; None is the lesser of 5 GiB and 2 % of the volume.
        durability: see `EngineConfig`.
        encryption: see `EngineConfig`.

    Raises:
        InvalidSetting: the store is to be encrypted and there is no master key.
        StoreUnreadable: the folder cannot be used safely; the message says why and what to do.
    """

    def __init__(
        self,
        path: Path,
        *,
        quota_bytes: int | None = None,
        namespace_quota_bytes: int | None = None,
        min_free_bytes: int | None = 0,
        durability: Durability = "process",
        encryption: Encryption = "off",
    ) -> None:
        self.path = path
        self.mirror: StoreMirror = NoMirror()
        self._reconciler: Reconciler | None = None
        self._counts = Counts(*_COUNTERS)
        self._reopening = threading.Lock()
        self.keys = keys_for(path, encryption)
        self.read_only = not prepare_root(path)
        self.namespace_quota_bytes = namespace_quota_bytes
        self.quota_bytes = default_quota(path) if quota_bytes is None else quota_bytes
        self._identities: dict[BlockHash, tuple[Mapping[str, str], str]] = {}
        self.files, self.catalog = self._open_to_read() if self.read_only else self._open(durability)
        self.keys.work_as(self.files.presence.name)
        self._reader = RecordReader(self.catalog, self.files, self.keys, self._counts)
        self.tier = StoredTier(self.catalog.records, self.keys)
        self.volume = Volume(path, min_free_bytes, self.catalog)
        if not self.read_only:
            self._finish_for_the_dead()

    def _open(self, durability: Durability) -> tuple[RecordFiles, Catalog]:
        with opening(self.path / "SCHEMA", self.keys.version, self.keys.unlock):
            files = RecordFiles(self.path, durable=durability == "power", unopened=self.keys.unopened)
            files.remove_leftovers()
            return files, open_catalog(files, durability, self.keys, self.quota_bytes // _LOG_DIVISOR)

    def _open_to_read(self) -> tuple[RecordFiles, Catalog]:
        log.warning("%s is read-only: what is there is used, and nothing is saved", self.path)
        files = RecordFiles(self.path, durable=False, read_only=True, unopened=self.keys.unopened)
        with reading(self.path / "SCHEMA", self.keys.version, self.keys.unlock):
            return files, Catalog(self.path / "catalog.db", files.presence, keys=self.keys, read_only=True)

    @classmethod
    def of_config(cls, path: Path, config: EngineConfig) -> BlockStore:
        """The store in a folder, as the settings of an engine want it. Raises as the constructor does."""
        store = cls(
            path,
            quota_bytes=_in_bytes(config.disk_budget_mb),
            namespace_quota_bytes=_in_bytes(config.namespace_budget_mb),
            min_free_bytes=_in_bytes(config.min_free_mb),
            durability=config.durability,
            encryption=config.encryption,
        )
        return mirrored(store, config)

    def ensure_in_place(self) -> None:
        """Make the store anew where its folder or its catalog was deleted or replaced since it was opened.

        What was stored is lost then, but for files that are still there. Costs one system call where all is well.

        Raises:
            StoreError: it cannot be made anew.
            OSError: the same.
        """
        if self.read_only or self.catalog.is_in_place():
            return
        with self._reopening:
            if self.catalog.is_in_place():
                return
            log.warning(
                "the store at %s was deleted or replaced while it was open: it is made anew", self.path
            )
            prepare_root(self.path)
            with opening(self.path / "SCHEMA", self.keys.version, self.keys.unlock):
                reopen_catalog(self.catalog, self.files)
            for root, (identity, namespace) in self._identities.items():
                self.files.write_identity(root, identity, namespace)
                self.catalog.records.register_root(root, identity, namespace)

    def begin_reconciling(self) -> None:
        """Compare all files with the catalog in the background, once; see `reconcile`."""
        if self._reconciler is None and not self.read_only:
            self._reconciler = Reconciler(self.catalog, self.files)

    def _finish_for_the_dead(self) -> None:
        """Finish what killed processes have begun: delete files without a row, and forget what they forgot."""
        try:
            self.catalog.budget.release_dead()
            while rows := self.catalog.records.doomed(_DELETE_AT_ONCE):
                self._delete_files([(key, self.files.place(root, key, kind)) for key, root, kind in rows])
            for key in self.catalog.noted(_FORGETTING):
                self.forget(*json.loads(key.removeprefix(_FORGETTING)))
        except (StoreError, OSError, ValueError, TypeError, KeyError) as error:
            log.warning(
                "what a process that was killed left in %s could not be removed: %s", self.path, error
            )

    def record_quota(self) -> int:
        """Most bytes that records may have: the quota without what else lies in the folder."""
        return self.quota_bytes - self.files.other_bytes()

    def close(self) -> None:
        """Close the catalog."""
        self.mirror.close()
        if self._reconciler is not None:
            self._reconciler.stop()
        self.catalog.close()
        self.files.presence.close()

    # -- identity and sessions ----------------------------------------------------------------------------

    def identify(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Write down once, for people and for a rebuild, what a root was hashed from; not where nothing may be written.

        Raises:
            StoreError: it cannot be written.
        """
        if self.read_only:
            return
        self.ensure_in_place()
        self._identities[root] = identity, namespace
        self.files.write_identity(root, identity, namespace)
        self.catalog.records.register_root(root, identity, namespace)

    def forget(self, namespace: str, session_id: str) -> bool:
        """Delete a session, the files that only it reached, and all of the quarantine; say if there was one."""
        note = _FORGETTING + json.dumps([namespace, session_id])
        found = True
        try:
            # Whoever opens the store after a kill goes on with it.
            self.catalog.write_note(note, "")
            self.mirror.forgetting(namespace, session_id)
            # The files go first: whatever happens meanwhile, they do not outlive the knowledge of whose they were.
            with self.catalog.transaction():
                records = self.catalog.branches.forget(namespace, session_id)
                for record in records:
                    self.files.delete(record)
                self.catalog.records.deleted(record.key for record in records)
        except SessionNotFound:
            found = False
        self.catalog.drop_note(note)
        self.catalog.scrub()
        # A damaged catalog that was set aside may name the session, too.
        self.files.empty_quarantine()
        return found

    def forget_namespace(self, namespace: str) -> None:
        """Delete what is left of a namespace whose sessions are forgotten, and its key: nothing opens it again.

        Raises:
            StoreError: the catalog cannot be written.
        """
        with self.catalog.transaction():
            records = self.catalog.records.remove_namespace(namespace)
            for record in records:
                self.files.delete(record)
            self.catalog.records.deleted(record.key for record in records)
        try:
            self.keys.forget(namespace)
        except OSError as error:
            raise StoreError(
                f"the key of namespace {namespace!r} cannot be deleted: {error.strerror}."
            ) from error
        self.catalog.scrub()

    def history(self, namespace: str, session_id: str) -> ChatHistory:
        """The text of a conversation, for who has no application that keeps it."""
        return ChatHistory(self.path, namespace, session_id, self.keys.of(namespace))

    # -- writing ------------------------------------------------------------------------------------------

    def commit(self, records: Sequence[Record[HostTensor]], commit: BranchCommit) -> BranchRow:
        """Store the records of a turn and move its branch; after this returns, a kill loses nothing of it.

        Raises:
            StoreFull: the quota or the volume cannot hold it. What was stored before stays, but for what was evicted.
            StoreError: a record's key is not the hash of its content, or the catalog cannot be written.
            OSError: a file cannot be written.
        """
        self._check(records)
        records, commit = self._hidden(records), hidden(commit, self.keys.hide)
        held = {commit.head, *commit.dependencies}
        branch, superseded = self._store(
            records, commit, held, commit.branch_id, lambda stored: self._move(stored, commit)
        )
        self._delete(superseded)
        self.mirror.committed(commit.namespace, commit.session_id)
        return branch

    def _move(self, stored: list[StoredRecord], commit: BranchCommit) -> tuple[BranchRow, list[StoredRecord]]:
        self.mirror.committing(commit.namespace, commit.session_id)
        return self.catalog.branches.commit(stored, commit)

    def keep(self, records: Sequence[Record[HostTensor]], owner: SessionOwner) -> None:
        """Store a part of a prompt whose turn has not ended, so that a retry goes on from there.

        No branch reaches it, so it is the first to make room for others.

        Raises:
            StoreFull, StoreError, OSError: as `commit` does.
        """
        self._check(records)
        self._store(
            self._hidden(records), owner, (), None, lambda stored: self.catalog.branches.keep(stored, owner)
        )

    def try_to_write(self) -> None:
        """See whether something could be stored now; nothing of it stays.

        Raises:
            StoreFull, StoreError, OSError: as `commit` does.
        """
        self.ensure_in_place()
        self.catalog.write_note(_TRYING, "")
        self.catalog.drop_note(_TRYING)
        self.volume.shortfall(0)
        self.files.try_to_write()

    def _check(self, records: Sequence[Record[HostTensor]]) -> None:
        self.ensure_in_place()
        for record in records:
            if record.key != record_hash(record.kind, record.parent, record.tokens):
                raise StoreError(f"the key {record.key.hex()} is not the hash of its record's tokens.")

    def _hidden(self, records: Sequence[Record[HostTensor]]) -> list[Record[HostTensor]]:
        hide = self.keys.hide
        return [replace(record, key=hide(record.key), parent=hide(record.parent)) for record in records]

    def _store(
        self,
        records: Sequence[Record[HostTensor]],
        owner: SessionOwner,
        held: Iterable[BlockHash],
        branch_id: int | None,
        enter: Callable[[list[StoredRecord]], T],
    ) -> T:
        """Write what is not stored yet and enter all of it into the catalog, while nothing that it needs is evicted."""
        for _ in range(_ATTEMPTS):
            plan = self._plan(records, owner.root, held, branch_id)
            done, entered = self._attempt(plan, branch_id, enter)
            if done:
                return cast(T, entered)
        raise StoreError(
            f"files in {self.path} disappear while they are written: does another program delete them?"
        )

    def _plan(
        self,
        records: Sequence[Record[HostTensor]],
        root: BlockHash,
        held: Iterable[BlockHash],
        branch_id: int | None,
    ) -> CommitPlan:
        """Make room for the records that are not stored yet, and hold those that are."""
        hold = {key for record in records for key in (record.key, record.parent)} | set(held)
        kept, new = self._divide(records, root)
        nbytes = bytes_of(new)
        # Outside the transaction, since what the volume owes stays noted where it makes the turn fail. What another
        # process evicts before it is held here is noticed when the turn is committed.
        lacking, free = self.volume.shortfall(nbytes) if new else (0, None)
        limits = Limits(self.record_quota(), self.namespace_quota_bytes, lacking)
        reservation, evicted = self.catalog.budget.reserve(
            root, nbytes, limits, hold, branch_id, [described for described, _ in new]
        )
        return CommitPlan(kept, new, evicted, reservation, free if lacking else None)

    def _divide(
        self, records: Sequence[Record[HostTensor]], root: BlockHash
    ) -> tuple[list[StoredRecord], list[tuple[StoredRecord, Record[HostTensor]]]]:
        """Records that are stored already, and those that must be written."""
        kept: list[StoredRecord] = []
        new: list[tuple[StoredRecord, Record[HostTensor]]] = []
        known = self.catalog.records.get_many([record.key for record in records])
        cipher = self.catalog.records.cipher(root)
        for record in records:
            described, row = describe_new(root, record, cipher), known.get(record.key)
            if row is not None and row.place == described.place and self.files.has(row):
                kept.append(replace(row, tokens=record.tokens))
            else:
                new.append((described, record))
        return kept, new

    def _attempt(
        self, plan: CommitPlan, branch_id: int | None, enter: Callable[[list[StoredRecord]], T]
    ) -> tuple[bool, T | None]:
        """Carry out a plan; False where a file that it relied on disappeared meanwhile."""
        try:
            self._delete_evicted(plan.evicted, plan.free, plan.nbytes)
            written = [self._write(plan.new[index:], branch_id) for index in range(len(plan.new))]
            if written:
                self.files.flush()
            if plan.free is not None:
                self.volume.wrote()
            records = plan.kept + written
            with self.catalog.transaction():
                self.catalog.budget.release(plan.reservation)
                if not all(self.files.has(record) for record in records):
                    return False, None
                return True, enter(records)
        except BaseException:
            self._undo(plan)
            raise

    def _write(
        self, pending: Sequence[tuple[StoredRecord, Record[HostTensor]]], branch_id: int | None
    ) -> StoredRecord:
        """Write the first of ``pending``. Where others filled the volume meanwhile, evict for all of them."""
        evicted, cipher = False, self.catalog.records.cipher(pending[0][0].root)
        for _ in range(_ATTEMPTS):
            try:
                stored = self.files.write(*pending[0], cipher)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
            else:
                if evicted:
                    self.volume.gives()
                return stored
            free, evicted = self.volume.mark(), True
            self.volume.require_giving(free.free)
            self._delete_evicted(self.catalog.budget.evict(bytes_of(pending), branch_id), free)
        raise StoreFull(f"the volume of {self.path} is full: free some space on it.")

    def _delete_evicted(self, records: Sequence[StoredRecord], free: Mark | None, nbytes: int = 0) -> None:
        """Delete evicted files. Where the volume lacked space, see whether that gave it ``nbytes`` to be written.

        Args:
            records: what was evicted.
            free: what was free before, where the volume lacked some.
            nbytes: bytes that are to be written now.

        Raises:
            StoreFull: the volume lacked space and still does.
        """
        self._delete(records)
        self._counts.add("evicted", len(records))
        if free is not None:
            self.volume.look(free, sum(record.nbytes for record in records), nbytes)

    def _delete(self, records: Sequence[StoredRecord]) -> None:
        """Delete the files of records whose rows were removed, unless somebody has stored them again."""
        for start in range(0, len(records), _DELETE_AT_ONCE):
            chunk = records[start : start + _DELETE_AT_ONCE]
            self._delete_files([(record.key, self.files.path_of(record)) for record in chunk])

    def _delete_files(self, files: Sequence[tuple[BlockHash, Path]]) -> None:
        with self.catalog.transaction():
            keys = [key for key, _ in files]
            kept = self.catalog.records.stored(keys) | self.catalog.budget.being_written(keys)
            for key, path in files:
                if key not in kept:
                    self.files.delete_at(path)
            self.catalog.records.deleted(keys)

    def _undo(self, plan: CommitPlan) -> None:
        try:
            self.catalog.budget.release(plan.reservation)
            self._delete([described for described, _ in plan.new])
        except (StoreError, OSError) as error:
            log.warning("what a failed commit left could not be removed: %s", error)

    # -- reading ------------------------------------------------------------------------------------------

    def load(self, root: BlockHash, key: BlockHash, allocate: Allocate) -> Record[Any] | None:
        """Read one record into arrays of ``allocate`` and verify it; None is a miss, counted by its reason."""
        return self._reader.load(root, key, allocate)

    # -- what there is ------------------------------------------------------------------------------------

    def check(self, fix: bool = False) -> CheckReport:
        """Audit the whole store, see `audit.check`; it reads every file. With ``fix``, mend what can be mended."""
        return check(self.catalog, self.files, self.record_quota(), fix)

    def stats(self) -> dict[str, int]:
        """Files and bytes stored, the quota, and since opening: records evicted and misses by reason."""
        return {
            **self.catalog.budget.totals(),
            "quota": self.quota_bytes,
            "volume_free": self._volume_free(),
            "min_free": self.volume.min_free,
            "quarantined": self.files.quarantined(),
            "failed_reads": self.catalog.failed_reads,
            **self._counts.read(),
        }

    def _volume_free(self) -> int:
        try:
            return self.volume.free_bytes()
        except OSError:
            return 0


def _in_bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * _MIB
