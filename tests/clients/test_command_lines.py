"""Agents for the command line, as their makers publish them, through a server that is killed between two turns.

`make test-clients` installs and runs them; elsewhere they are skipped. The model has random weights and a context of
64K tokens, because the first request of an agent is longer than the embedded model's context. What it says is decided
by grammars (see `support.steering`).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from support import command_line, tiny_models
from support.server_process import running
from support.steering import ANSWER, CALL, PRINTED, Exchange, Proxy, steered, steering, usage_of

FOLDER = os.environ.get("CLIENTS_FOLDER")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="make test-clients installs and runs the clients")

CONTEXT = 65_536
VARIABLES = {
    "AGENT_MEMORY_MEMORY_BUDGET_MB": "512",
    "AGENT_MEMORY_MIN_FREE_MB": "0",
    "AGENT_MEMORY_SERVER_MAX_TOKENS": "64",
}
FRAME = 32
"""More tokens than a one-word question and the begin of an answer have."""


@dataclass(frozen=True)
class Place:
    """Where a client works, and what it is told of the server."""

    home: Path
    project: Path
    url: str
    model: str

    def connected(self, client: str) -> str:
        """What the command prints for a client."""
        return command_line.command("connect", client, "--model", self.model, "--url", self.url).stdout


class Client(NamedTuple):
    """An agent for the command line."""

    programs: tuple[str, ...]
    """Where npm puts it, as patterns; the first that is there."""
    prepare: Callable[[Place], dict[str, str]]
    """Writes its settings, and returns variables of its environment."""
    begin: tuple[str, ...]
    go_on: tuple[str, ...]
    """What stands before a question that begins a conversation, and before one that goes on with the last."""


def claude_code(place: Place) -> dict[str, str]:
    words = shlex.split(place.connected("claude-code"))
    said = dict(word.split("=", 1) for word in words if word != "export")
    return said | {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}


def codex(place: Place) -> dict[str, str]:
    folder = place.home / ".codex"
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(place.connected("codex"))
    return {"LOCAL_MODEL_KEY": "any"}


def opencode(place: Place) -> dict[str, str]:
    (place.project / "opencode.json").write_text(place.connected("opencode"))
    return {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}


_CODEX = ("exec", "--skip-git-repo-check", "-s", "danger-full-access")

CLIENTS = {
    "claude-code": Client(
        ("@anthropic-ai/claude-code-*/claude",),
        claude_code,
        ("-p", "--allowedTools", "Bash", "--"),
        ("-p", "--continue", "--allowedTools", "Bash", "--"),
    ),
    "codex": Client((".bin/codex",), codex, _CODEX, (*_CODEX, "resume", "--last")),
    "opencode": Client(
        ("opencode-*-baseline/bin/opencode", "opencode-*-*/bin/opencode"),
        opencode,
        ("run",),
        ("run", "--continue"),
    ),
}


class Agent:
    """A client in its place."""

    def __init__(self, client: Client, place: Place, proxy: Proxy) -> None:
        found = [path for name in client.programs for path in Path(FOLDER or "").glob(f"node_modules/{name}")]
        if not found:
            pytest.skip(f"npm did not install {client.programs[0]}")
        self._program = found[0].resolve()
        self._client, self._place, self._proxy = client, place, proxy
        for folder in (place.home, place.project):
            folder.mkdir()
        environ = {"HOME": str(place.home), "PATH": os.environ["PATH"], "TERM": "dumb"}
        self._environ = environ | client.prepare(place)

    def ask(self, words: str, *, go_on: bool = True) -> list[Exchange]:
        """Ask, see the answer, and return the requests that the agent sent with its tools."""
        before = len(self._proxy.seen)
        arguments = self._client.go_on if go_on else self._client.begin
        done = subprocess.run(
            [self._program, *arguments, words],
            cwd=self._place.project,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        sent = self._proxy.seen[before:]
        assert done.returncode == 0, done.stdout + done.stderr
        assert ANSWER["const"] in done.stdout
        assert {exchange.status for exchange in sent} == {200}
        return [exchange for exchange in sent if exchange.has_tools]


def opening_tokens(url: str, exchange: Exchange) -> int:
    """The tokens of the tools and of the instructions with which a request begins."""
    body = steered(exchange.path, exchange.body)
    name = "input" if "input" in body else "messages"
    roles = [message.get("role") not in ("developer", "system") for message in exchange.turn]
    instructions = exchange.turn[: roles.index(True)]
    more: dict[str, Any] = {name: [*instructions, {"role": "user", "content": "x"}], "stream": False}
    headers = {"x-session-id": "opening"}
    answer = httpx.post(url + exchange.path, json=body | more, headers=headers, timeout=280)
    return usage_of([answer.json()]).prompt - FRAME


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CLIENTS)
def test_an_agent_goes_on_after_the_server_was_killed(name: str, tmp_path: Path) -> None:
    config = tiny_models.LLAMA | {"max_position_embeddings": CONTEXT}
    model = tiny_models.write(tmp_path / "model", config)
    options = ("--model", model)
    with steering() as (proxy, url):
        agent = Agent(CLIENTS[name], Place(tmp_path / "home", tmp_path / "project", url, model), proxy)
        with running(tmp_path, *options, **VARIABLES) as (process, proxy.target):
            turns = agent.ask("Say pong.", go_on=False)
            call, result = agent.ask(CALL)
            assert PRINTED in str(result.turn[-1])
            assert PRINTED not in str(call.turn)
            turns += [call, result, *agent.ask("And again.")]
            process.kill()
            process.wait()
        with running(tmp_path, *options, **VARIABLES) as (_, proxy.target):
            turns += agent.ask("Are you still there?")
            # Whatever was read or said before is there, also after the server was killed.
            used = [turn.usage for turn in turns]
            assert [turn.cached for turn in used[1:]] == [turn.prompt + turn.answer for turn in used[:-1]]
            (other,) = agent.ask("A second conversation.", go_on=False)
            assert other.usage.cached >= opening_tokens(proxy.target, other)
