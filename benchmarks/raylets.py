"""Several machines, as raylets of one machine: who moves when a node is killed or added, and what is lost.

    steady    sessions take turns at three nodes; none of them moves
    killed    a node is killed with SIGKILL, all its processes at once: its sessions move, and no others, and go on
              from the object store with all that was acknowledged
    added     the configuration asks for a fourth node: about a quarter of the sessions moves
    crowded   many clients take turns in one session at once, each in a conversation of its own: none loses a turn

How large a share moves says little of a few sessions, so many more names are only routed, before and after. Each node
has a store of its own; they share a folder as the object store, and turns are acknowledged when they are in it. A turn
counts as lost if the next one of its session has to compute any of its prompt again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import argument_parser, write_result

from agent_memory_core.scale import deploy, serve_config, status

SESSIONS, TURNS, NODES = 24, 5, 3
AT_ONCE = 4
CLIENTS = 12
"""That share one session, and take turns all at once."""
NAMES = 1200
"""Of sessions that are only routed."""
TARGETS = {
    "steady, moved": "<= 0",
    "killed, lost turns": "<= 0",
    "killed, others moved": "<= 0",
    "killed, not warm": "<= 0",
    "added, moved / ideal": "<= 1.3",
    "added, lost turns": "<= 0",
    "crowded, lost turns": "<= 0",
}


@dataclass
class Talk:
    """One session, as its client holds it."""

    name: str
    port: int
    messages: list[dict[str, str]] = field(default_factory=list)
    node: str = ""
    """that answered last"""
    known: int = 0
    """tokens of the last prompt"""
    who: str = ""
    """one of several that share the session"""


@dataclass(frozen=True)
class Turn:
    """What was seen of one turn."""

    moved: bool
    before: str
    lost: bool
    warm: bool
    seconds: float


def main() -> None:
    """Run the three parts and write the result file."""
    options = argument_parser("raylets", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Replicas are processes of their own, which must find what this one finds.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        cluster = Raylets(Path(folder))
        try:
            results = measure(cluster)
        finally:
            cluster.shutdown()
    settings = {
        "sessions": SESSIONS,
        "turns": TURNS,
        "nodes": NODES,
        "clients": CLIENTS,
        "names": NAMES,
        "targets": TARGETS,
    }
    write_result(options.out, settings, results, {"name": "tiny-chat"})
    missed = [name for name, target in TARGETS.items() if results["ratios"][name] > float(target.split()[1])]
    sys.exit(f"missed: {', '.join(missed)}" if missed else None)


class Raylets:
    """A cluster of raylets. The head runs no replica, so that any of the others can be killed."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        self.port, dashboard = _free_ports(2)
        self._dashboard = f"http://127.0.0.1:{dashboard}"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "object_store_memory": 100 * 2**20,
                "include_dashboard": True,
                "dashboard_port": dashboard,
            },
        )
        self._nodes: dict[str, Any] = {}

    def add(self) -> None:
        """Start a node."""
        node = self._cluster.add_node(num_cpus=1, resources={"mlx": 1}, object_store_memory=100 * 2**20)
        self._nodes[node.node_id] = node

    def kill(self, name: str) -> None:
        """Kill a node with all its processes, as a machine that loses its power."""
        node = self._nodes.pop(name)
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in [*_children(raylet), raylet]:
            os.kill(pid, signal.SIGKILL)

    def ask_for(self, nodes: int) -> None:
        """Put the configuration for so many nodes into effect."""
        engine = {
            "cache_dir": str(self._folder / "{node}"),
            "cold_url": (self._folder / "bucket").as_uri(),
            "cold_ack": "remote",
            "min_free_mb": 0,
        }
        deploy(
            serve_config(nodes, port=self.port, everywhere=False, engine=engine, drain=30.0), self._dashboard
        )
        while Counter(status(self._dashboard)["replicas"].values())["RUNNING"] != nodes:
            time.sleep(0.2)

    def shutdown(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


def _free_ports(count: int) -> list[int]:
    """Ports of this machine on which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def _children(pid: int) -> list[int]:
    """All processes below one, the deepest first."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    below = [int(child) for child in found.stdout.split()]
    return [*(process for child in below for process in _children(child)), *below]


def measure(cluster: Raylets) -> dict[str, Any]:
    """The three parts, one after another."""
    for _ in range(NODES):
        cluster.add()
    cluster.ask_for(NODES)
    talks = [Talk(f"session-{number}", cluster.port) for number in range(SESSIONS)]
    steady = [turn for _ in range(TURNS) for turn in rounds(talks)][SESSIONS:]
    spread = Counter(talk.node for talk in talks)
    (victim, its_own), *_ = spread.most_common()
    cluster.kill(victim)
    killed = rounds(talks)
    cluster.add()
    cluster.ask_for(NODES)
    rounds(talks)
    before = routes(cluster.port)
    cluster.add()
    cluster.ask_for(NODES + 1)
    added = rounds(talks)
    after = routes(cluster.port)
    moved = sum(after[name] != node for name, node in before.items())
    ideal = NAMES / (NODES + 1)
    crowd = [Talk("crowd", cluster.port, who=f"client {number}") for number in range(CLIENTS)]
    crowded = [turn for _ in range(TURNS) for turn in rounds(crowd, CLIENTS)]
    return {
        "spread": sorted(spread.values()),
        "steady": told(steady),
        "killed": told(killed) | {"its own": its_own},
        "added": told(added) | {"names moved": moved, "ideal": ideal},
        "crowded": told(crowded),
        "ratios": {
            "steady, moved": sum(turn.moved for turn in steady),
            "killed, lost turns": sum(turn.lost for turn in killed),
            "killed, others moved": sum(turn.moved and turn.before != victim for turn in killed)
            + sum(not turn.moved and turn.before == victim for turn in killed),
            "killed, not warm": sum(not turn.warm for turn in killed),
            "added, moved / ideal": round(moved / ideal, 3),
            "added, lost turns": sum(turn.lost for turn in added),
            "crowded, lost turns": sum(turn.lost for turn in crowded),
        },
    }


def told(turns: list[Turn]) -> dict[str, Any]:
    """What is worth keeping of some turns."""
    return {
        "turns": len(turns),
        "moved": sum(turn.moved for turn in turns),
        "lost": sum(turn.lost for turn in turns),
        "slowest": round(max(turn.seconds for turn in turns), 3),
    }


def rounds(talks: list[Talk], at_once: int = AT_ONCE) -> list[Turn]:
    """One turn of each session, several at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(take_turn, talks))


def routes(port: int) -> dict[str, str]:
    """The node to which each of many names is routed."""
    names = [f"name-{number}" for number in range(NAMES)]

    def node_of(name: str) -> str:
        url = f"http://127.0.0.1:{port}/health/live"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"x-session-id": name})) as found:
            return str(found.headers["x-agent-memory-node"])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(node_of, names), strict=True))


def take_turn(talk: Talk) -> Turn:
    """One turn of a session; a client asks again where a node does not answer."""
    number = len(talk.messages)
    talk.messages.append({"role": "user", "content": f"Question {number} of {talk.who or talk.name}. " * 8})
    began = time.perf_counter()
    answer, node = asked(talk)
    seconds = time.perf_counter() - began
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    turn = Turn(
        moved=bool(talk.node) and node != talk.node,
        before=talk.node,
        lost=cached < talk.known,
        warm=cached > 0,
        seconds=seconds,
    )
    talk.messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    talk.node, talk.known = node, usage["prompt_tokens"]
    return turn


def asked(talk: Talk) -> tuple[dict[str, Any], str]:
    """The answer to what a session says, and the node that gave it."""
    body = {"model": "tiny-chat", "messages": talk.messages, "max_tokens": 8}
    request = urllib.request.Request(
        f"http://127.0.0.1:{talk.port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "x-session-id": talk.name},
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                return json.load(found), found.headers["x-agent-memory-node"]
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
