"""Objects in a bucket, a folder or memory, by the library ``obstore``: with deadlines, a breaker and compare-and-swap.

Everything is a coroutine. What is not there is an answer; what cannot be reached is a `ColdFailure`, soon or at the
deadline, and at once while the breaker is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agent_memory_core.errors import InvalidSetting, StoreError
from agent_memory_core.storage.cold.breaker import Breaker

if TYPE_CHECKING:
    from obstore.store import ClientConfig, MemoryStore

T = TypeVar("T")

Buffer = bytes | memoryview

_CONNECT = 2
_RETRIES = 1
_DELETE_AT_ONCE = 500
_PREFIXES = {"gs": "GOOGLE", "az": "AZURE", "azure": "AZURE", "abfs": "AZURE", "abfss": "AZURE"}
"""What the variables of the environment begin with that speak of an address; all others are of S3."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_ASKED_FOR_CREDENTIALS = ("169.254.169.254", "metadata.google.internal")
"""Hosts that only machines of a cloud reach, which obstore asks where the environment has no credentials."""

_LOCK = "heads.lock"
_LOCK_PAUSE = 0.005


class ColdFailure(StoreError):
    """The object store cannot be reached, refuses, or does not answer in time."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object."""

    data: memoryview
    e_tag: str


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as a listing has it."""

    path: str
    size: int
    modified: datetime


UNCHANGED = Found(memoryview(b""), "")
"""The answer to a `get` of what has the e_tag still that was named."""


def open_bucket(url: str, timeout: float) -> Any:
    """The store of ``obstore`` that an address names. Credentials come from the environment, as obstore reads it.

    Raises:
        InvalidSetting: obstore is not installed, or knows no such address.
    """
    if find_spec("obstore") is None:
        raise InvalidSetting("cold_url needs obstore: pip install 'agent-memory-mlx[cold]'")
    from obstore import store
    from obstore.exceptions import BaseError

    if url.startswith("memory:"):
        return _memory(url)
    try:
        if url.startswith("file:"):
            return store.from_url(url, mkdir=True)
        return store.from_url(
            url,
            client_options=_client_options(url, timeout),
            retry_config={"max_retries": _RETRIES},
        )
    except (BaseError, ValueError, OSError) as error:
        raise InvalidSetting(
            f"cold_url={url!r} cannot be used: {_first_line(error)}. Give an address such as s3://bucket/folder, "
            f"gs://bucket/folder, az://container/folder or file:///folder."
        ) from error


def _client_options(url: str, timeout: float) -> ClientConfig:
    """How to connect. What obstore would read of this from the environment is overruled by what it is given here."""
    prefix = _PREFIXES.get(url.partition(":")[0], "AWS")
    options: ClientConfig = {"timeout": f"{timeout:g}s", "connect_timeout": f"{_CONNECT}s"}
    if os.environ.get(f"{prefix}_ALLOW_HTTP", "").lower() in ("1", "true"):
        options["allow_http"] = True
    return options


@cache
def _memory(url: str) -> MemoryStore:
    """One store for each address in this process."""
    from obstore.store import MemoryStore

    return MemoryStore()


def _first_line(error: BaseException | str) -> str:
    return str(error).partition("\n")[0][:200].rstrip(".")


def _said(error: BaseException) -> str:
    """What a cloud says in its answer, and what to do about it, in one line."""
    text = str(error)
    if any(host in text for host in _ASKED_FOR_CREDENTIALS):
        return "there are no credentials for it in the environment"
    code, message = (re.search(f"<{tag}>([^<]*)", text) for tag in ("Code", "Message"))
    if code is None:
        return _first_line(error)
    said = code[1] + (f": {_first_line(message[1])}" if message is not None else "")
    if code[1] in _NO_BUCKET:
        return f"{said}. Create it, or correct cold_url"
    return f"{said}. Look at the credentials in the environment" if _is_refused(error) else said


def _is_refused(error: BaseException) -> bool:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    return isinstance(error, PermissionDeniedError | UnauthenticatedError)


def _is_without_bucket(error: BaseException) -> bool:
    """Whether not the object is missing, but the whole bucket."""
    return any(f"<Code>{code}<" in str(error) for code in _NO_BUCKET)


class Objects:
    """One bucket.

    Args:
        bucket: a store of ``obstore``.
        timeout: seconds for one request.
        breaker: told of every request.
    """

    def __init__(self, bucket: Any, timeout: float, breaker: Breaker | None = None) -> None:
        self._bucket = bucket
        self._timeout = timeout
        self.breaker = breaker or Breaker()
        self.requests = {"get": 0, "put": 0, "head": 0, "list": 0, "delete": 0}
        """How many requests of each kind were made."""
        folder = getattr(bucket, "prefix", None)
        self._folder = folder if isinstance(folder, Path) else None

    async def get(self, path: str, unless: str | None = None) -> Found | None:
        """An object; None if there is none, and `UNCHANGED` if it has the e_tag ``unless``."""
        from obstore.exceptions import NotModifiedError

        async def read() -> Found:
            found = await self._bucket.get_async(path, options={"if_none_match": unless} if unless else None)
            return Found(memoryview(await found.bytes_async()), found.meta["e_tag"])

        try:
            return await self._ask("get", read())
        except FileNotFoundError:
            return None
        except NotModifiedError:
            return UNCHANGED

    async def put_new(self, path: str, parts: Sequence[Buffer]) -> bool:
        """Write an object, unless there is one; say whether it was written."""
        from obstore.exceptions import AlreadyExistsError

        try:
            await self._ask("put", self._put(path, parts, "create"))
        except AlreadyExistsError:
            return False
        return True

    async def put(self, path: str, parts: Sequence[Buffer]) -> None:
        """Write an object in place of another one or of none."""
        await self._ask("put", self._put(path, parts, "overwrite"))

    async def swap(self, path: str, data: bytes, e_tag: str | None) -> str | None:
        """Write an object, if it has that e_tag still, or with None if there is none; return its new e_tag.

        None says that somebody else wrote it meanwhile.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        if e_tag is None:
            mode: Any = "create"
        elif self._folder is None:
            mode = {"e_tag": e_tag}
        else:
            return await self._ask("put", self._swap_file(self._folder, path, data, e_tag))
        try:
            return str((await self._ask("put", self._put(path, [data], mode)))["e_tag"])
        except (AlreadyExistsError, PreconditionError):
            return None

    async def modified(self, path: str) -> datetime | None:
        """When an object was written; None if there is none."""
        try:
            found = await self._ask("head", self._bucket.head_async(path))
        except FileNotFoundError:
            return None
        when: datetime = found["last_modified"]
        return when

    async def listed(self, prefix: str) -> AsyncIterator[Listed]:
        """All objects below a prefix."""
        pages = aiter(self._bucket.list(prefix))
        while (page := await self._ask("list", anext(pages, None))) is not None:
            for meta in page:
                yield Listed(meta["path"], meta["size"], meta["last_modified"])

    async def folders(self, prefix: str) -> list[str]:
        """The names of what lies directly below a prefix and has something below itself."""
        found = await self._ask("list", self._bucket.list_with_delimiter_async(prefix))
        return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    async def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        for start in range(0, len(paths), _DELETE_AT_ONCE):
            chunk = list(paths[start : start + _DELETE_AT_ONCE])
            try:
                await self._ask("delete", self._bucket.delete_async(chunk))
            except FileNotFoundError:
                # A folder stops there, so each is tried by itself.
                for path in chunk if len(chunk) > 1 else ():
                    await self.delete([path])

    async def _put(self, path: str, parts: Sequence[Buffer], mode: Any) -> Any:
        # An object in parts could not be refused as a whole.
        return await self._bucket.put_async(path, list(parts), mode=mode, use_multipart=False)

    async def _swap_file(self, folder: Path, path: str, data: bytes, e_tag: str) -> str | None:
        """What a folder has no request for: a lock keeps everybody else out between the look and the write."""
        lock = await _locked(folder / _LOCK)
        try:
            found = await self._bucket.head_async(path)
            return (
                str((await self._put(path, [data], "overwrite"))["e_tag"])
                if found["e_tag"] == e_tag
                else None
            )
        except FileNotFoundError:
            return None
        finally:
            os.close(lock)

    async def _ask(self, kind: str, asked: Awaitable[T]) -> T:
        from obstore.exceptions import (
            AlreadyExistsError,
            BaseError,
            NotModifiedError,
            PreconditionError,
        )

        if wait := self.breaker.wait:
            if asyncio.iscoroutine(asked):
                asked.close()
            raise ColdFailure(f"{self.breaker.why}, a moment ago; it is tried again in {wait:.0f} seconds.")
        self.requests[kind] += 1
        try:
            answer = await asyncio.wait_for(asked, self._timeout)
        except (FileNotFoundError, AlreadyExistsError, NotModifiedError, PreconditionError) as error:
            if _is_without_bucket(error):
                raise self._failed(f"the object store failed: {_said(error)}") from error
            self.breaker.worked()
            raise
        except TimeoutError as error:
            raise self._failed(f"the object store has not answered for {self._timeout:g} seconds") from error
        except (BaseError, OSError) as error:
            raise self._failed(f"the object store failed: {_said(error)}") from error
        self.breaker.worked()
        return answer

    def _failed(self, why: str) -> ColdFailure:
        self.breaker.failed(why)
        return ColdFailure(f"{why}.")


async def _locked(path: Path) -> int:
    """A file descriptor that holds the lock of a file until it is closed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            # A thread that waits for the lock could not be called back, and would get it for nobody.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            await asyncio.sleep(_LOCK_PAUSE)
    except BaseException:
        os.close(fd)
        raise
