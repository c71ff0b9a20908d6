"""Who may ask, from where, how often and how much."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from support import command_line, http_server
from support.http_server import Running

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.server import ServerSettings, create_app
from agent_memory_core.server.binding import check_binding
from agent_memory_core.server.keys import Keys

ADA = {"role": "user", "content": "My name is Ada."}
CHAT: dict[str, Any] = {"model": "tiny-chat", "messages": [ADA], "max_tokens": 4}


@pytest.fixture(scope="module")
def keyed(memory: AgentMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that asks for a key: two of a file, and one of the settings."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("anna", "bert")}
    file.write_text("".join(f'[tenant-{name}]\nsha256 = "{digest}"\n' for name, digest in hashes.items()))
    limits: dict[str, Any] = {"rate_per_session": "3/minute", "rate_per_key": "20/minute"}
    with http_server.serve(memory, api_key_file=file, api_keys=("carl",), **limits) as running:
        yield running


def test_without_a_key_nothing_but_health_is_answered(keyed: Running) -> None:
    with keyed.http() as client:
        assert client.get("/health").status_code == 200
        assert client.head("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401, path
    with pytest.raises(openai.AuthenticationError) as refused:
        keyed.openai("wrong").chat.completions.create(**CHAT)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(anthropic.AuthenticationError) as other:
        keyed.anthropic("wrong").messages.create(**CHAT)
    body: Any = other.value.body
    assert body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("header", ["x-api-key", "anthropic-api-key", "api-key", "authorization"])
def test_a_key_may_come_in_any_clients_header(keyed: Running, header: str) -> None:
    value = "Bearer carl" if header == "authorization" else "carl"
    with keyed.http(**{header: value}) as client:
        assert client.get("/v1/models").status_code == 200


def test_keys_share_nothing_and_see_nothing_of_each_other(keyed: Running) -> None:
    secret = {"role": "user", "content": "My name is Ada. " * 20}
    reuse: list[int] = []
    for key in ("anna", "anna", "bert", "carl"):
        answer = keyed.openai(key, **{"X-Session-ID": f"s-{key}-{len(reuse)}"}).chat.completions.create(
            **CHAT | {"messages": [secret]}
        )
        reuse.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert reuse[1] > 64
    assert [reuse[0], *reuse[2:]] == [0, 0, 0]
    carl = "key-" + hashlib.sha256(b"carl").hexdigest()[:16]
    owners = {
        info.session_id: info.namespace for info in keyed.memory.sessions() if info.session_id[:2] == "s-"
    }
    assert owners == {
        "s-anna-0": "tenant-anna",
        "s-anna-1": "tenant-anna",
        "s-bert-2": "tenant-bert",
        "s-carl-3": carl,
    }


def test_a_session_and_a_key_have_only_so_many_turns_in_a_time(keyed: Running) -> None:
    with keyed.http(**{"x-api-key": "anna"}) as http:
        http.post("/v1/agents", json={"agent_id": "often"})
        asked = [
            http.post("/v1/agents/often/generate", json={"prompt": "Hi.", "max_tokens": 1}) for _ in "1234"
        ]
    assert [answer.status_code for answer in asked] == [200, 200, 200, 429]
    client = keyed.openai("bert", **{"X-Session-ID": "often"})
    for _ in range(3):
        client.chat.completions.create(**CHAT)
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**CHAT)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    keyed.openai("bert").chat.completions.create(**CHAT)
    with keyed.http(**{"x-api-key": "bert"}) as http:
        answers = [http.post("/v1/chat/completions", json=CHAT) for _ in range(20)]
    assert answers[-1].status_code == 429
    assert "This key" in answers[-1].json()["error"]["message"]


def status(server: Running, **headers: str) -> int:
    with server.http(**headers) as client:
        return client.post("/v1/chat/completions", json=CHAT).status_code


def test_pages_of_other_origins_and_names_of_other_hosts_are_refused(server: Running) -> None:
    assert status(server, Host="localhost:1234") == 200
    assert status(server, Host="evil.example") == 403
    assert status(server, Host="[::1]:80") == 200
    assert status(server, Origin="http://localhost:3000") == 200
    assert status(server, Origin="https://evil.example") == 403
    assert status(server, Origin="null") == 403


def test_an_allowed_origin_may_ask_with_a_key(memory: AgentMemory) -> None:
    origin = {"Origin": "https://good.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    options: dict[str, Any] = {"cors_origins": ("https://good.example",), "api_keys": ("k",)}
    with http_server.serve(memory, **options) as server, server.http(**origin) as client:
        asked = client.options("/v1/chat/completions", headers=asks)
        assert asked.headers["access-control-allow-origin"] == "https://good.example"
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": "k"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert client.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_request_that_is_too_large_too_slow_or_too_deep_is_refused(memory: AgentMemory) -> None:
    with http_server.serve(memory, max_body_mb=0.01, body_timeout=0.2) as server, server.http() as client:
        large = {"messages": [{"role": "user", "content": "x" * 20_000}]}
        assert client.post("/v1/chat/completions", json=large).status_code == 413
        # In chunks, whose number and size no header tells.
        assert client.post("/v1/messages", content=iter([b"x" * 6000] * 3)).json()["error"]["type"] == (
            "request_too_large"
        )
        assert slow(server) == 408
        deep = '{"messages": ' + "[" * 200 + "]" * 200 + "}"
        assert client.post("/v1/chat/completions", content=deep).status_code == 400
        tool = {"type": "function", "function": {"name": "f", "parameters": nested(100)}}
        answer = client.post("/v1/chat/completions", json=CHAT | {"tools": [tool]})
        assert "deeper than 64" in answer.json()["error"]["message"]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def slow(server: Running) -> int:
    """The status for a request whose body never comes."""
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/messages HTTP/1.1\r\nHost: {host}\r\nContent-Length: 10\r\n\r\n"
        connection.sendall(head.encode())
        return int(connection.recv(1000).split()[1])


def test_a_full_queue_says_when_to_come_again_and_a_place_is_freed(memory: AgentMemory) -> None:
    long = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": long}}
    body = CHAT | {"max_tokens": 8000, "stream": True, "response_format": form}
    with http_server.serve(memory, max_in_flight=1) as server, server.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as first:
            # Held: a client that drops its iterator hangs up.
            lines = first.iter_lines()
            next(lines)
            second = client.post("/v1/messages", json=CHAT)
            assert second.status_code == 429
            assert second.json()["error"]["type"] == "rate_limit_error"
            assert int(second.headers["retry-after"]) >= 1
        http_server.wait_until(lambda: client.post("/v1/messages", json=CHAT).status_code == 200)


def test_every_answer_can_be_found_again(server: Running) -> None:
    with server.http() as client:
        answers = [client.get("/health"), client.post("/v1/messages", json={}), client.get("/nothing")]
        ids = [answer.headers["request-id"] for answer in answers]
        assert len(set(ids)) == 3
        assert client.get("/health", headers={"X-Request-ID": "mine"}).headers["x-request-id"] == "mine"
        assert client.get("/health", headers={"X-Request-ID": "a b"}).headers["x-request-id"] != "a b"


def test_before_the_model_is_loaded_the_server_says_so(tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    memory = AgentMemory(model=str(missing), cache_dir=None)
    serving = http_server.serve(memory, ready=False, any_model=True)
    with memory, serving as server, server.http() as client:
        assert client.get("/health/live").status_code == 200
        http_server.wait_until(lambda: "no folder" in client.get("/health").json()["reason"])
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["error"]["type"]) == (503, "unavailable_error")
        answer: httpx.Response = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_loading"


# Settings


def test_a_server_without_keys_listens_to_its_own_machine_only(memory: AgentMemory) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_binding(ServerSettings(host=host), has_keys=False)
    with pytest.raises(InvalidSetting, match=r"host='0\.0\.0\.0' without keys"):
        check_binding(ServerSettings(host="0.0.0.0"), has_keys=False)
    check_binding(ServerSettings(host="0.0.0.0"), has_keys=True)
    check_binding(ServerSettings(host="0.0.0.0", insecure_no_auth=True), has_keys=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": -1}, "port=-1"),
        ({"prot": 1}, "prot"),
        ({"rate_per_key": "often"}, "rate_per_key='often'"),
        ({"rate_per_session": "0/minute"}, "rate_per_session='0/minute'"),
        ({"rate_per_session": "60/minute;5/second"}, "rate_per_session='60/minute;5/second'"),
        ({"cors_origins": ("*",), "api_keys": ("k",)}, "cors_origins"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        ServerSettings(**settings)
    assert says in str(refused.value)


def test_variables_set_what_the_constructor_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_SERVER_API_KEYS", "key-a, key-b")
    monkeypatch.setenv("AGENT_MEMORY_SERVER_PORT", "81")
    settings = ServerSettings(port=80)
    assert (settings.api_keys, settings.port) == (("key-a", "key-b"), 80)
    assert "key-a" not in repr(settings)
    AgentMemory(cache_dir=None)
    monkeypatch.setenv("AGENT_MEMORY_SERVER_PROT", "80")
    with pytest.raises(InvalidSetting, match="AGENT_MEMORY_SERVER_PROT"):
        ServerSettings()


def test_older_names_are_read_and_those_of_other_programs_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of-the-user")
    assert ServerSettings().api_keys == ()
    monkeypatch.setenv("SEMANTIC_API_KEY", "key-a,key-b")
    assert ServerSettings().api_keys == ("key-a", "key-b")
    monkeypatch.setenv("SEMANTIC_AUTH_DISABLED", "true")
    assert ServerSettings().api_keys == ()
    with pytest.raises(InvalidSetting, match="without keys"):
        check_binding(ServerSettings(host="0.0.0.0"), has_keys=False)
    monkeypatch.setenv("SEMANTIC_SERVER_WORKERS", "2")
    with pytest.raises(InvalidSetting, match="SEMANTIC_SERVER_WORKERS='2'"):
        ServerSettings()


def test_a_key_is_made_whose_file_is_its_owners_and_does_not_hold_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    made = [
        command_line.command("keys", "add", name, "--file", str(file)).stdout.strip()
        for name in ("a", 'b "c"')
    ]
    keys = Keys(ServerSettings(api_key_file=file))
    tenants = [keys.tenant({"authorization": f"Bearer {key}"}).namespace for key in made]
    assert tenants == ["a", 'b "c"']
    assert file.stat().st_mode & 0o777 == 0o600
    assert not [key for key in made if key in file.read_text()]
    refused = command_line.command("keys", "add", "a", "--file", str(file), code=1)
    assert "already" in refused.stderr
    file.write_text("no toml")
    command_line.command("keys", "add", "d", "--file", str(file), code=1)


OPENS = "ab" * 32


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not toml", "cannot be read"),
        ('[a]\nsha256 = "short"', "64 hexadecimal digits"),
        ("[a]\nsha256 = []", "64 hexadecimal digits"),
        (f'[a]\nsha256 = ["{OPENS}", 7]', "64 hexadecimal digits"),
        ("[a]\nmax_in_flight = 2", "64 hexadecimal digits"),
        ("a = 1", "64 hexadecimal digits"),
        (f'[a]\nsha265 = "{OPENS}"', "'sha265' is none of sha256, rate_per_session"),
        (f'[a]\nsha256 = "{OPENS}"\nrate_per_kee = "1/minute"', "'rate_per_kee' is none of"),
        (f'[a]\nsha256 = "{OPENS}"\nrate_per_key = "often"', "rate_per_key='often'"),
        (f'[a]\nsha256 = "{OPENS}"\nrate_per_session = "0/minute"', "rate_per_session='0/minute'"),
        (f'[a]\nsha256 = "{OPENS}"\nrate_per_session = 60', "rate_per_session=60"),
        (f'[a]\nsha256 = "{OPENS}"\nmax_in_flight = 0', "max_in_flight=0"),
        (f'[a]\nsha256 = "{OPENS}"\nmax_in_flight = true', "max_in_flight=True"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_stops_the_server(
    memory: AgentMemory, tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match="api_key_file") as refused:
        create_app(memory, ServerSettings(api_key_file=file))
    assert says in str(refused.value)
    assert "short" not in str(refused.value), "whoever writes a key there must not find it in a log"


def table(name: str, **limits: object) -> str:
    """What a file of keys says of the one who has the key ``name``."""
    values = {"sha256": hashlib.sha256(name.encode()).hexdigest(), **limits}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    return f"[tenant-{name}]\n{lines}\n"


def test_a_namespace_has_limits_of_its_own(memory: AgentMemory, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    slow = table("slow", rate_per_key="2/hour", rate_per_session="1/hour")
    file.write_text(table("anna") + slow + table("fast", rate_per_key="9/hour"))
    settings: dict[str, Any] = {"rate_per_key": "3/hour", "rate_per_session": "5/hour"}
    with http_server.serve(memory, api_key_file=file, admin_key="root", **settings) as server:
        of_session = {"X-Session-ID": "one"}
        assert [status(server, **{"x-api-key": "slow"}, **of_session) for _ in "12"] == [200, 429]
        assert [status(server, **{"x-api-key": "anna"}) for _ in "1234"] == [200, 200, 200, 429]
        assert {status(server, **{"x-api-key": "fast"}) for _ in "12345"} == {200}
        # What a new file says holds from now on, and a wrong one changes nothing.
        with server.http(**{"X-Admin-Key": "root"}) as admin:
            file.write_text(table("anna", rate_per_key="9/day"))
            assert admin.post("/admin/reload").json()["status"] == "success"
            assert [status(server, **{"x-api-key": name}) for name in ("anna", "slow")] == [200, 401]
            file.write_text(table("slow") + table("anna", max_in_flight="many"))
            assert admin.post("/admin/reload").json()["status"] == "failed"
            assert [status(server, **{"x-api-key": name}) for name in ("anna", "slow")] == [200, 401]


def test_a_namespace_has_as_many_turns_at_once_as_its_table_says(memory: AgentMemory, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(table("anna", max_in_flight=1) + table("bert", max_in_flight=2))
    long = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": long}}
    body = CHAT | {"max_tokens": 8000, "stream": True, "response_format": form}
    with http_server.serve(memory, api_key_file=file, max_in_flight_per_key=1) as server:
        for key, second in (("anna", 429), ("bert", 200)):
            with (
                server.http(**{"x-api-key": key}) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as first,
            ):
                lines = first.iter_lines()
                next(lines)
                assert client.post("/v1/chat/completions", json=CHAT).status_code == second
