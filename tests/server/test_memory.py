"""What a server holds does not grow with the requests that it has answered."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections import Counter

import pytest
from support.http_server import Running

from agent_memory_core.server.process import release_freed_memory

FRAGMENTED = """
import threading
from agent_memory_core.server.process import release_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

held = []
def hold():
    held.extend(bytearray(16_000) for _ in range(2000))

threads = [threading.Thread(target=hold) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
full = resident()
del held[::2]
kept = resident()
release_freed_memory()
print(full, kept, resident())
"""


@pytest.mark.skipif(not release_freed_memory(), reason="only glibc keeps what was freed below what is in use")
def test_memory_that_was_freed_between_what_is_in_use_goes_back_to_the_system() -> None:
    said = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True)
    full, kept, released = map(int, said.stdout.split())
    assert kept > full * 0.95, "else there would be nothing to do"
    assert kept - released > 0.5 * 2000 * 16_000


def test_answered_requests_leave_nothing_behind(server: Running) -> None:
    """Of what the server itself makes for a request: after three times as many there are no more objects of it."""
    ask(server, 4)
    before = of_the_server()
    ask(server, 12)
    # A turn is closed a moment after its client has read the end of the answer.
    deadline = time.monotonic() + 10
    while (grown := of_the_server() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not grown, f"{grown} more objects after 12 more requests"


def ask(server: Running, count: int) -> None:
    bodies = (
        ("/v1/chat/completions", {"max_tokens": 1, "n": 2}),
        ("/v1/messages", {"max_tokens": 1}),
        ("/v1/responses", {"max_output_tokens": 1, "store": False}),
        ("/v1/chat/completions", {"max_tokens": 1, "stream": True}),
    )
    with server.http(**{"x-session-id": "again"}) as client:
        for index in range(count):
            path, more = bodies[index % len(bodies)]
            said = (
                {"input": "Hi."}
                if "responses" in path
                else {"messages": [{"role": "user", "content": "Hi."}]}
            )
            assert client.post(path, json=said | more).status_code == 200


def of_the_server() -> Counter[str]:
    gc.collect()
    return Counter(
        kind.__qualname__
        for kind in map(type, gc.get_objects())
        if str(kind.__module__).startswith("agent_memory_core.server")
    )
