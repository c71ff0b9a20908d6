"""The server as a process: started from the command line, ended by a signal."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.http_server import wait_until
from support.server_process import command, running

LONG = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}
ADA = {"role": "user", "content": "My name is Ada."}


@contextmanager
def stream_of(url: str) -> Iterator[Any]:
    """A stream that has begun and does not end soon."""
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}
    options: Any = {"model": "tiny-chat", "messages": [ADA], "max_tokens": 8000, "response_format": form}
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
        client.chat.completions.create(**options, stream=True) as stream,
    ):
        next(iter(stream))
        yield stream


def cached_of(url: str) -> tuple[int, int]:
    """How many tokens of the prompt of a session were there, and how many it has."""
    body = {"messages": [ADA], "max_tokens": 24, "session_id": "ada"}
    usage = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def test_a_server_that_was_killed_goes_on_and_one_that_is_ended_tells_its_clients(tmp_path: Path) -> None:
    with running(tmp_path) as (process, url):
        assert cached_of(url)[0] == 0
        process.kill()
    with running(tmp_path) as (process, url):
        cached, prompt = cached_of(url)
        assert cached == prompt - 1
        with stream_of(url) as stream:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
            assert httpx.get(f"{url}/health").json()["reason"] == "draining"
            refused = httpx.post(f"{url}/v1/messages", json={"messages": [ADA], "max_tokens": 4})
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="cancelled"):
                list(stream)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "./nothing"), "there is no folder './nothing'"),
        (("--host", "0.0.0.0"), "without keys"),
        (("--log-format", "xml"), "log_format='xml'"),
        (("--models", "./nothing.json"), "of one model"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    args, environ = command("--cache-dir", str(tmp_path), *options)
    done = subprocess.run(args, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert says in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_file_of_settings_is_read_again_and_the_log_quotes_nobody(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("AGENT_MEMORY_SERVER_API_KEYS=old-key\nAGENT_MEMORY_SERVER_LOG_FORMAT=json\nOTHER=1\n")
    with running(tmp_path) as (process, url):

        def status(key: str) -> int:
            body = {"messages": [ADA], "max_tokens": 2, "session_id": "a-session"}
            headers = {"x-api-key": key}
            return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code

        assert (status("old-key"), status("new-key")) == (200, 401)
        file.write_text("AGENT_MEMORY_SERVER_API_KEYS=new-key\nAGENT_MEMORY_SERVER_MODEL_ALIAS=house\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: status("new-key") == 200)
        assert status("old-key") == 401
        listed = httpx.get(f"{url}/v1/models", headers={"x-api-key": "new-key"}).json()["data"]
        assert "house" in [entry["id"] for entry in listed]
        file.write_text("AGENT_MEMORY_SERVER_KEEP_ALIVE=never\n")
        process.send_signal(signal.SIGHUP)
        log = tmp_path / "log"
        wait_until(lambda: "stay as they are" in log.read_text())
        assert status("new-key") == 200
    text = log.read_text()
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    first = next(record for record in records if "ttft" in record)
    assert first["endpoint"] == "/v1/chat/completions"
    assert first["prompt"] > 0
    assert not [
        word
        for word in ("Ada", "a-session", "old-key", "new-key")
        if f'"{word}' in text or f" {word}" in text
    ]


def test_a_unix_socket_takes_the_place_of_an_address_and_opens_no_admin_path(tmp_path: Path) -> None:
    path, admin = tmp_path / "own.sock", tmp_path / "admin.sock"
    options = ("--cache-dir", str(tmp_path / "store"), "--uds", str(path), "--host", "0.0.0.0")
    args, environ = command(*options, AGENT_MEMORY_SERVER_ADMIN_SOCKET=str(admin))
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(args, env=environ, cwd=tmp_path, stderr=stderr) as process,
        client_of(path) as client,
    ):
        try:
            wait_until(lambda: f"running on unix:{path}" in log.read_text())
            wait_until(lambda: client.get("/health/ready").status_code == 200)
            assert "http://" not in log.read_text(), "it listens nowhere else"
            assert path.stat().st_mode & 0o777 == 0o600
            body = {"messages": [ADA], "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            assert client.get("/admin/stats").status_code == 403
            with client_of(admin) as owner:
                assert owner.get("/admin/stats").status_code == 200
            process.terminate()
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    assert not path.exists()


def client_of(path: Path) -> httpx.Client:
    """A client on a Unix socket."""
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60)


def test_the_admin_socket_asks_for_no_key_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.touch()
    variables = {"AGENT_MEMORY_SERVER_ADMIN_SOCKET": str(path)}
    args, environ = command("--cache-dir", str(tmp_path / "store"), **variables)
    done = subprocess.run(args, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert "it is no socket" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    path.unlink()
    with running(tmp_path, **variables) as (process, url):
        assert path.stat().st_mode & 0o777 == 0o600
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            assert client.get("/admin/models/current").json()["model_id"] == "tiny-chat"
        assert httpx.get(f"{url}/admin/models/current").status_code == 403
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert not path.exists()
