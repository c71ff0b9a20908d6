"""A thousand nodes and a million sessions, over books alone: who moves, what lies in the bucket, what it costs.

Nothing is computed and nothing is sent. Two things are counted:

    the ring      consistent hashing with as many points a node as the application asks Ray for, in which nodes are lost
                  and join; the share of the sessions that moves, beside the least that can
    the bucket    sessions of many turns go through the heads of the cold tier (`head.merged`), which tell how many
                  requests a turn makes, how large heads are and what is left for a sweep; the records' bytes come from
                  the shape of a model of 8 billion parameters

    price a month = GB stored * price of a GB + PUTs * price of a PUT + GETs * price of a GET

with the list prices of one region of one provider, which are settings here as everything else is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from record import argument_parser, write_result

from agent_memory_core.blocks.block import root_hash
from agent_memory_core.scale.config import POINTS
from agent_memory_core.storage.cold.head import Head, HeadBranch, HeadRecord, Offer, merged, to_bytes

NODES, SESSIONS = 1000, 1_000_000
CHANGES = (1, 10, 100)
SAMPLE = 200
MODEL = {
    "name": "8 billion parameters",
    "layers": 36,
    "kv heads": 8,
    "head dim": 128,
    "bits at rest": 6.5 + 4.5,
    "bits of a tail": 32,
}
LOAD = {
    "turns of a session a month": 30,
    "new tokens a turn": 400,
    "tokens that sessions share": 2048,
    "sessions that share them": 10_000,
    "busy seconds of a day": 6 * 3600,
    "sessions that come to a node anew": 0.05,
    "days until a sweep": 1,
}
PRICES = {"GB a month": 0.023, "1,000 PUT": 0.005, "1,000 GET": 0.0004}
BLOCK = 128
TARGETS = {"moved / least": "<= 1.3", "largest node / mean": "<= 1.5", "requests a second / object": "<= 10"}
Points = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def main() -> None:
    """Count and write the result file."""
    options = argument_parser("fleet", __doc__).parse_args()
    ring, bucket = moves(), totals(count(SAMPLE))
    ratios = {
        "moved / least": max(found["moved / least"] for found in ring.values()),
        "largest node / mean": max(found["largest node / mean"] for found in ring.values()),
        "requests a second / object": bucket["requests a second, one head"],
    }
    settings = {
        "nodes": NODES,
        "sessions": SESSIONS,
        "points of a node": POINTS,
        "sessions in the books": SAMPLE,
        "block tokens": BLOCK,
        "load": LOAD,
        "prices": PRICES,
        "targets": TARGETS,
    }
    write_result(options.out, settings, {"ring": ring, "bucket": bucket, "ratios": ratios}, MODEL)


# The ring ---------------------------------------------------------------------------------------------------


def hashed(names: Iterator[str] | list[str]) -> np.ndarray[Any, Any]:
    """A 64-bit hash of each name."""
    return np.fromiter((xxhash.xxh3_64_intdigest(name.encode()) for name in names), np.uint64)


def points_of(nodes: range) -> Points:
    """The points of some nodes in order, and whose they are."""
    places = hashed(f"node {node} point {point}" for node in nodes for point in range(POINTS))
    owners = np.repeat(np.asarray(nodes), POINTS)
    order = np.argsort(places)
    return places[order], owners[order]


def owners_of(sessions: np.ndarray[Any, Any], points: Points) -> np.ndarray[Any, Any]:
    """The node of each session: that of the next point."""
    places, owners = points
    return owners[np.searchsorted(places, sessions) % len(places)]


def moves() -> dict[str, dict[str, float]]:
    """What moves when nodes are lost and when they join."""
    sessions = hashed(f"session {number}" for number in range(SESSIONS))
    before = owners_of(sessions, points_of(range(NODES)))
    found = {}
    for change in CHANGES:
        for name, nodes in (
            (f"{change} lost", range(change, NODES)),
            (f"{change} joined", range(NODES + change)),
        ):
            after = owners_of(sessions, points_of(nodes))
            # Nobody can move fewer than those of the lost nodes, or the new nodes' equal share.
            least = np.mean(before < change) if "lost" in name else change / (NODES + change)
            moved = float(np.mean(before != after))
            sizes = np.bincount(after)[list(nodes)]
            found[name] = {
                "moved": round(moved, 6),
                "least": round(float(least), 6),
                "moved / least": round(moved / float(least), 4),
                "largest node / mean": round(float(sizes.max() / sizes.mean()), 4),
            }
    return found


# The bucket -------------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """What some sessions did in a month."""

    sessions: int = 0
    turns: int = 0
    puts: int = 0
    gets: int = 0
    own_bytes: int = 0
    """of records that only one session has"""
    shared_bytes: int = 0
    """of records that many sessions have, once"""
    left_bytes: int = 0
    """of tails that another turn took the place of"""
    head_bytes: int = 0


def bytes_of(tokens: int, bits: str) -> int:
    """Bytes of the keys and values of so many tokens."""
    return int(tokens * MODEL["layers"] * MODEL["kv heads"] * MODEL["head dim"] * MODEL[bits] / 8)  # type: ignore[operator]


def count(sessions: int) -> Counted:
    """Take sessions through all turns of a month, each by the books of its head."""
    done = Counted(shared_bytes=bytes_of(LOAD["tokens that sessions share"], "bits at rest"))  # type: ignore[arg-type]
    for number in range(sessions):
        _month(number, done)
    return done


def _month(number: int, done: Counted) -> None:
    identity = {"model": "made", "namespace": "default"}
    root = root_hash(identity)
    head, position, tokens = (
        Head(namespace="default", session_id=f"{number}"),
        None,
        LOAD["tokens that sessions share"],
    )
    tail = 0
    for turn in range(int(LOAD["turns of a session a month"])):
        tokens += LOAD["new tokens a turn"]
        branch = _branch(number, root, int(tokens), turn)
        new = [record for record in branch.records if record.key not in head.records]
        shared = int(LOAD["tokens that sessions share"]) // BLOCK if turn == 0 else 0
        # A get and a swap of the head, and a put of each record; shared ones are found there, which takes one more.
        done.gets += 1 + shared
        done.puts += 1 + len(new)
        done.own_bytes += sum(record.nbytes for record in new[shared:])
        done.left_bytes += tail
        tail = branch.records[-1].nbytes if branch.tail else 0
        head, placed = merged(head, [Offer(1, position, branch)], {root: identity}, is_thread=False)
        position = placed[1]
        done.turns += 1
    done.sessions += 1
    done.head_bytes += len(to_bytes(head))
    # A node that does not know the session gets its head and all of its records.
    done.gets += round(LOAD["sessions that come to a node anew"] * done.turns / done.sessions) * (
        1 + len(head.records)
    )


def _branch(number: int, root: bytes, tokens: int, turn: int) -> HeadBranch:
    """A branch of so many tokens, whose names are made of its place in place of token ids."""
    shared = int(LOAD["tokens that sessions share"]) // BLOCK
    keys = [_key("shared" if place < shared else f"{number}", place) for place in range(tokens // BLOCK)]
    records = [HeadRecord(key, f"{0:032x}", bytes_of(BLOCK, "bits at rest")) for key in keys]
    rest, tail = tokens % BLOCK, None
    if rest:
        tail = _key(f"{number} tail", turn)
        records.append(HeadRecord(tail, f"{0:032x}", bytes_of(rest, "bits of a tail")))
    return HeadBranch(
        name="",
        generation=turn + 1,
        root=root,
        head=keys[-1],
        tail=tail,
        tokens=tokens,
        prompt_tokens=tokens - 100,
        lane="",
        last_use=float(turn),
        records=tuple(records),
    )


def _key(name: str, place: int) -> bytes:
    return root_hash({"name": name, "place": f"{place}"})


def totals(done: Counted) -> dict[str, float]:
    """What the whole fleet has and asks for in a month of 30 days, and its price."""
    each = SESSIONS / done.sessions
    groups = SESSIONS / LOAD["sessions that share them"]
    of_a_day = done.left_bytes * each / 30
    stored = {
        "records": done.own_bytes * each - done.left_bytes * each,
        "shared records": done.shared_bytes * groups,
        "tails until a sweep": of_a_day * LOAD["days until a sweep"],
        "heads": done.head_bytes * each,
    }
    gigabytes = sum(stored.values()) / 1e9
    puts, gets = done.puts * each, done.gets * each
    busy = 30 * LOAD["busy seconds of a day"]
    turns = done.turns / done.sessions
    price = {
        "storage": gigabytes * PRICES["GB a month"],
        "PUT": puts / 1000 * PRICES["1,000 PUT"],
        "GET": gets / 1000 * PRICES["1,000 GET"],
    }
    return {
        **{f"{name}, GB": round(value / 1e9, 1) for name, value in stored.items()},
        "stored, GB": round(gigabytes, 1),
        "PUT a turn": round(done.puts / done.turns, 2),
        "GET a turn": round(done.gets / done.turns, 2),
        "PUT a second": round(puts / busy, 1),
        "GET a second": round(gets / busy, 1),
        "requests a second, one head": round(2 * turns / busy, 6),
        "bytes of a head": round(done.head_bytes / done.sessions),
        **{f"price of {name}": round(value, 2) for name, value in price.items()},
        "price of a month": round(sum(price.values()), 2),
        "price of a session a month": round(sum(price.values()) / SESSIONS, 6),
    }


if __name__ == "__main__":
    main()
