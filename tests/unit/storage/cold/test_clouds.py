"""The protocols of real clouds, spoken by servers on this machine: moto's S3 and Microsoft's emulator of Azure.

Neither comes with the tools of developers: ``make test-scale`` installs both, and elsewhere these tests are skipped.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from support.cold_turns import OWNER, cold_store, newest, tier_of, tokens_in, tokens_of
from support.stored_turns import BLOCK, ids, turn

from agent_memory_core.storage.cold import tier as cold_tier
from agent_memory_core.storage.cold.objects import UNCHANGED, ColdFailure, Objects, open_bucket

AZURITE = shutil.which(os.environ.get("AZURITE", "azurite-blob"))
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Those that every emulator has, and its documentation names."""


@dataclass(frozen=True)
class Cloud:
    """A server with one bucket."""

    scheme: str
    refuse: Callable[[pytest.MonkeyPatch], None]
    """makes the credentials in the environment wrong"""

    def objects(self, bucket: str = "there") -> Objects:
        return Objects(open_bucket(f"{self.scheme}://{bucket}/folder", 5.0), 5.0)


@contextmanager
def s3(patch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        ask(f"{address}/there", "PUT")

        def trust(requests: bytes) -> None:
            ask(f"{address}/moto-api/reset-auth", "POST", requests, content_type="text/plain")

        yield Cloud("s3", lambda _: trust(b"0"))
        trust(b"inf")
    finally:
        server.stop()


@contextmanager
def azure(patch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    if AZURITE is None:
        pytest.skip("there is no azurite-blob")
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    command = [AZURITE, "--blobPort", str(port), "--inMemoryPersistence", "--disableTelemetry", "--silent"]
    # Newer versions of the protocol than it knows of change nothing that is used here.
    with subprocess.Popen([*command, "--skipApiVersionCheck"], stdout=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}/{ACCOUNT}"
            patch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
            patch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
            patch.setenv("AZURE_STORAGE_ENDPOINT", address)
            patch.setenv("AZURE_ALLOW_HTTP", "true")
            make_container(address, "there")
            wrong = base64.b64encode(b"wrong").decode()
            yield Cloud("az", lambda later: later.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong))
        finally:
            server.kill()


def ask(url: str, method: str, data: bytes = b"", **headers: str) -> None:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    urllib.request.urlopen(urllib.request.Request(url, data, names, method=method), timeout=10).close()


def make_container(address: str, name: str) -> None:
    """Which no library here does: the request is signed by hand. Waits for the server."""
    deadline = time.monotonic() + 60
    while True:
        date, version = formatdate(usegmt=True), "2021-12-02"
        about = f"x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        signed = "PUT" + 12 * "\n" + about
        digest = hmac.new(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256).digest()
        key = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers = {"x_ms_date": date, "x_ms_version": version, "authorization": key, "content_type": ""}
        try:
            ask(f"{address}/{name}?restype=container", "PUT", **headers)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="module", params=[s3, azure])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    with pytest.MonkeyPatch.context() as patch, request.param(patch) as found:
        yield found


async def test_what_is_there_is_not_written_again(cloud: Cloud) -> None:
    objects = cloud.objects()
    assert await objects.get("a/b") is None
    assert await objects.put_new("a/b", [b"one", memoryview(b"two")])
    assert not await objects.put_new("a/b", [b"other"])
    found = await objects.get("a/b")
    assert found is not None
    assert bytes(found.data) == b"onetwo"
    assert await objects.get("a/b", unless=found.e_tag) is UNCHANGED
    await objects.put("a/b", [b"three"])
    assert await objects.get("a/b", unless=found.e_tag) not in (None, UNCHANGED)


async def test_a_head_is_swapped_only_as_it_was_seen(cloud: Cloud) -> None:
    objects = cloud.objects()
    first = await objects.swap("head", b"0", None)
    assert first is not None
    assert await objects.swap("head", b"no", None) is None
    second = await objects.swap("head", b"1", first)
    assert second not in (None, first)
    assert await objects.swap("head", b"2", first) is None
    found = await objects.get("head")
    assert found is not None
    assert (bytes(found.data), found.e_tag) == (b"1", second)
    assert await objects.swap("gone", b"", first) is None


async def test_what_is_listed_is_deleted(cloud: Cloud) -> None:
    objects = cloud.objects()
    for path in ("v1/a/x", "v1/a/y", "v1/b%2Fc/x"):
        await objects.put(path, [b"data"])
    assert sorted(await objects.folders("v1/")) == ["a", "b%2Fc"]
    found = [listed async for listed in objects.listed("v1/a/")]
    assert sorted((listed.path, listed.size) for listed in found) == [("v1/a/x", 4), ("v1/a/y", 4)]
    assert await objects.modified("v1/a/x") is not None
    await objects.delete(["v1/a/gone", "v1/a/x", "v1/a/y"])
    assert [listed async for listed in objects.listed("v1/a/")] == []
    assert await objects.modified("v1/a/x") is None


def test_two_machines_that_go_on_from_one_place_both_stay(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_tier, "FRESH", 0.0)
    bucket = open_bucket(f"{cloud.scheme}://there/sessions", 10.0)
    with (
        closing(cold_store(tmp_path / "here", bucket)) as here,
        closing(cold_store(tmp_path / "there", bucket)) as there,
    ):
        turn(here, ids(2 * BLOCK))
        assert tier_of(here).flush(20.0)
        there.mirror.look(*OWNER)
        ends = [(*ids(2 * BLOCK), n, n) for n in (1, 2)]
        for store, tokens in zip((here, there), ends, strict=True):
            turn(store, tokens, branch=newest(store))
            assert tier_of(store).flush(20.0)
        here.mirror.look(*OWNER)
        assert tokens_of(here) == ends
        assert asyncio.run(tokens_in(bucket)) == ends
        here.forget(*OWNER)
        assert tier_of(here).flush(20.0)
        there.mirror.look(*OWNER)
        assert tokens_of(there) == []


REQUESTS: list[Callable[[Objects], Any]] = [
    lambda objects: objects.get("a"),
    lambda objects: objects.put_new("a", [b"x"]),
    lambda objects: objects.swap("a", b"", None),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=["get", "put", "swap"])
async def test_a_bucket_that_is_not_there_is_no_empty_one(
    cloud: Cloud, request_: Callable[[Objects], Any]
) -> None:
    with pytest.raises(
        ColdFailure, match=r"^the object store failed: \w+: [^\n]+ Create it, or correct cold_url\.$"
    ):
        await request_(cloud.objects("nobody-made-it"))


@pytest.mark.parametrize("request_", REQUESTS, ids=["get", "put", "swap"])
async def test_wrong_credentials_are_named(
    cloud: Cloud, request_: Callable[[Objects], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tests of a cloud: moto trusts nobody any more."""
    cloud.refuse(monkeypatch)
    with pytest.raises(ColdFailure, match=r"Look at the credentials in the environment\.$"):
        await request_(cloud.objects())
