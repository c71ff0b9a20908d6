"""Every kind of bucket refuses what is there, swaps only what is as it was seen, and answers before the deadline."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from obstore.store import LocalStore, MemoryStore
from support.cold_turns import Weather

from agent_memory_core.errors import InvalidSetting
from agent_memory_core.storage.cold.breaker import FAILURES
from agent_memory_core.storage.cold.objects import UNCHANGED, ColdFailure, Objects, open_bucket


@pytest.fixture(params=["memory", "folder"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return Objects(MemoryStore() if request.param == "memory" else LocalStore(tmp_path), 5.0)


async def test_what_is_there_is_not_written_again(objects: Objects) -> None:
    assert await objects.get("a/b") is None
    assert await objects.put_new("a/b", [b"one", memoryview(b"two")])
    assert not await objects.put_new("a/b", [b"other"])
    found = await objects.get("a/b")
    assert found is not None
    assert bytes(found.data) == b"onetwo"
    assert await objects.get("a/b", unless=found.e_tag) is UNCHANGED
    assert await objects.get("a/b", unless='"another"') == found


async def test_only_one_of_many_swaps_wins(objects: Objects) -> None:
    first = await objects.swap("head", b"0", None)
    assert first is not None
    assert await objects.swap("head", b"no", None) is None
    tags = await asyncio.gather(*(objects.swap("head", b"%d" % n, first) for n in range(8)))
    (winner,) = [n for n, tag in enumerate(tags) if tag is not None]
    found = await objects.get("head")
    assert found is not None
    assert (bytes(found.data), found.e_tag) == (b"%d" % winner, tags[winner])
    assert await objects.swap("gone", b"", first) is None


async def test_what_is_listed_is_deleted(objects: Objects) -> None:
    for path in ("v1/a/x", "v1/a/y", "v1/b%2Fc/x"):
        await objects.put(path, [b"data"])
    assert sorted(await objects.folders("v1/")) == ["a", "b%2Fc"]
    found = [listed async for listed in objects.listed("v1/a/")]
    assert sorted((listed.path, listed.size) for listed in found) == [("v1/a/x", 4), ("v1/a/y", 4)]
    assert await objects.modified("v1/a/x") == next(x.modified for x in found if x.path == "v1/a/x")
    await objects.delete(["v1/a/gone", "v1/a/x", "v1/a/y"])
    assert [listed async for listed in objects.listed("v1/a/")] == []
    assert await objects.modified("v1/a/x") is None


async def test_a_silent_bucket_is_a_failure_at_the_deadline_and_then_at_once() -> None:
    weather = Weather(MemoryStore())
    objects = Objects(weather, 0.02)
    weather.is_gone = True
    for _ in range(FAILURES):
        with pytest.raises(ColdFailure, match=r"not answered for 0\.02 seconds"):
            await objects.get("a")
    with pytest.raises(ColdFailure, match=r"not answered for 0\.02 seconds, a moment ago"):
        await objects.get("a")
    assert len(weather.calls) == FAILURES


async def test_a_failing_bucket_is_one_sentence() -> None:
    weather = Weather(MemoryStore())
    weather.fails = lambda: True
    with pytest.raises(ColdFailure, match="the object store failed: connection reset by peer"):
        await Objects(weather, 5.0).put("a", [b""])


async def test_what_is_not_there_is_no_failure() -> None:
    objects = Objects(MemoryStore(), 5.0)
    for _ in range(2 * FAILURES):
        assert await objects.get("a") is None
    assert objects.requests == {"get": 2 * FAILURES, "put": 0, "head": 0, "list": 0, "delete": 0}


@pytest.mark.parametrize("url", ["nowhere://x", "no address", "s3:///"])
def test_an_impossible_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="cannot be used"):
        open_bucket(url, 1.0)


@pytest.mark.parametrize("url", ["s3://b/f", "gs://b/f", "az://b/f"])
def test_every_cloud_has_its_address(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert open_bucket(url, 1.0) is not None


@pytest.mark.parametrize(("url", "variable"), [("s3://b", "AWS"), ("gs://b", "GOOGLE"), ("az://b", "AZURE")])
def test_a_server_without_a_certificate_may_be_allowed(
    url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert "allow_http" not in open_bucket(url, 1.0).client_options
    monkeypatch.setenv(f"{variable}_ALLOW_HTTP", "true")
    options = open_bucket(url, 1.0).client_options
    assert (options["allow_http"], options["timeout"]) == ("true", "1s")


async def test_without_credentials_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather(MemoryStore())

    async def ask(path: str, **options: object) -> None:
        raise GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 1s - HTTP error")

    monkeypatch.setattr(weather, "get_async", ask)
    with pytest.raises(ColdFailure, match="there are no credentials for it in the environment"):
        await Objects(weather, 5.0).get("a")


def test_a_name_in_memory_is_one_bucket(tmp_path: Path) -> None:
    assert open_bucket("memory://x", 1.0) is open_bucket("memory://x", 1.0)
    assert open_bucket("memory://x", 1.0) is not open_bucket("memory://y", 1.0)
    assert open_bucket((tmp_path / "new").as_uri(), 1.0).prefix == tmp_path / "new"
