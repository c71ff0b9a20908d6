"""The books of a store of chains under a budget, and rules of what leaves it first.

As in the product, a block that another one follows never leaves before it, and nothing of the turn at hand leaves. The
rules differ in which of the last blocks of all chains goes first.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent_traces import BLOCK_TOKENS, Turn

TOKENS_PER_SECOND = 400
"""Prefill at the beginning of a prompt. It is only the unit of the results: their ratios do not depend on it."""

EQUAL_AT = 30_600
"""At this position attention costs as much as everything else. For Llama 3.1 8B all else is 16.06 GFLOP a token, and
attention 4 operations for each of 32 layers, 4,096 numbers and tokens before."""


def prefill_seconds(index: int, tokens: int = BLOCK_TOKENS) -> float:
    """Seconds to compute the block at an index of its chain, of blocks of so many tokens."""
    return tokens / TOKENS_PER_SECOND * (1 + (index + 0.5) * tokens / EQUAL_AT)


@dataclass(slots=True, eq=False)
class Node:
    """One block at hand."""

    name: int
    parent: Node | None
    seconds: float
    """to compute it again"""
    turns: int
    """how many turns made its chain up to it"""
    last: int
    """the number of the turn that used it last"""
    uses: int = 1
    children: int = 0
    held: bool = False


class Policy:
    """A rule of what leaves first: here the lowest rank, and the least recently used of several.

    Args:
        rank: gives a block its rank, when it becomes the last of a chain or was used again.
        ages: rank all that comes later above what has left, so that what is not used grows old (GreedyDual).
    """

    def __init__(self, rank: Callable[[Node], float], *, ages: bool = False) -> None:
        self._rank, self._ages, self._floor = rank, ages, 0.0
        self._heap: list[tuple[float, int, int, Node]] = []
        self._ranks: dict[int, tuple[float, int]] = {}

    def add(self, node: Node) -> None:
        """This block may leave from now on."""
        rank = self._rank(node) + self._floor
        self._ranks[node.name] = rank, node.last
        heapq.heappush(self._heap, (rank, node.last, node.name, node))

    def remove(self, node: Node) -> None:
        """This block may not leave any more, or has left."""
        self._ranks.pop(node.name, None)

    def ended(self, node: Node, now: int, *, used: bool) -> None:
        """The last block of a chain was used by a turn that goes on from it, or has left."""

    def victim(self, now: int) -> Node | None:
        """What leaves first; None if nothing may leave."""
        while self._heap:
            rank, last, name, node = self._heap[0]
            if self._ranks.get(name) == (rank, last):
                self._floor = rank if self._ages else 0.0
                return node
            heapq.heappop(self._heap)
        return None


class Probation(Policy):
    """What only one turn used leaves first while it is more than a tenth of the budget (2Q, S3-FIFO); else LRU."""

    def __init__(self, budget: int) -> None:
        self._share = budget // 10
        self._once: OrderedDict[int, tuple[Node, int]] = OrderedDict()
        self._more: OrderedDict[int, Node] = OrderedDict()
        self._once_blocks = 0

    def add(self, node: Node) -> None:
        if node.turns > 1 or node.uses > 1:
            self._more[node.name] = node
            return
        blocks = _used_once(node)
        self._once[node.name] = node, blocks
        self._once_blocks += blocks

    def remove(self, node: Node) -> None:
        self._more.pop(node.name, None)
        if node.name in self._once:
            self._once_blocks -= self._once.pop(node.name)[1]

    def victim(self, now: int) -> Node | None:
        once = next(iter(self._once.values()), (None, 0))[0]
        more = next(iter(self._more.values()), None)
        return once or more if self._once_blocks > self._share else more or once


def _used_once(node: Node) -> int:
    count, here = 1, node.parent
    while here is not None and here.uses == 1:
        count, here = count + 1, here.parent
    return count


class Hazard(Policy):
    """The rate of uses at an age, counted as the trace goes on, times the cost: the lowest leaves first (LHD).

    Chains are of classes by the number of their turns, and ages double. Of a class only the oldest block can leave.
    """

    def __init__(self) -> None:
        self._queues: defaultdict[int, OrderedDict[int, Node]] = defaultdict(OrderedDict)
        self._used: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._lived: defaultdict[tuple[int, int], int] = defaultdict(int)

    def add(self, node: Node) -> None:
        self._queues[_magnitude(node.turns)][node.name] = node

    def remove(self, node: Node) -> None:
        self._queues[_magnitude(node.turns)].pop(node.name, None)

    def ended(self, node: Node, now: int, *, used: bool) -> None:
        kind, age = _magnitude(node.turns), now - node.last
        self._used[kind, _magnitude(age)] += used
        for size in range(_magnitude(age) + 1):
            self._lived[kind, size] += max(0, min(age + 1, 2 ** (size + 1)) - 2**size)

    def victim(self, now: int) -> Node | None:
        oldest = [next(iter(queue.values())) for queue in self._queues.values() if queue]
        return min(oldest, key=lambda node: (self._worth(node, now), node.last), default=None)

    def _worth(self, node: Node, now: int) -> float:
        kind, size = _magnitude(node.turns), _magnitude(now - node.last)
        return node.seconds * (self._used[kind, size] + 0.01) / (self._lived[kind, size] + 1)


def _magnitude(number: int) -> int:
    return max(1, number).bit_length() - 1


class Books:
    """What is at hand of all chains, within a budget of so many blocks of so many tokens."""

    def __init__(self, budget: int, policy: Policy, tokens: int = BLOCK_TOKENS) -> None:
        self.budget, self._tokens = budget, tokens
        self.nodes: dict[int, Node] = {}
        self._policy = policy
        self._now = 0

    def turn(self, blocks: Sequence[int]) -> int:
        """Serve a turn: how many of its first blocks were at hand. Afterwards as many of them are as have room."""
        self._now += 1
        path = self._hold(blocks)
        known = len(path)
        turns = path[-1].turns + 1 if path else 1
        for index in range(known, len(blocks)):
            if len(self.nodes) >= self.budget and not self._evict():
                break
            path.append(self._put(blocks[index], path[-1] if path else None, index, turns))
        for node in path:
            node.held = False
        if path and not path[-1].children:
            self._policy.add(path[-1])
        return known

    def _hold(self, blocks: Sequence[int]) -> list[Node]:
        path: list[Node] = []
        for name in blocks:
            if name not in self.nodes:
                break
            path.append(self.nodes[name])
        if path and not path[-1].children:
            self._policy.ended(path[-1], self._now, used=True)
            self._policy.remove(path[-1])
        for node in path:
            node.held, node.last = True, self._now
            node.uses += 1
        return path

    def _put(self, name: int, parent: Node | None, index: int, turns: int) -> Node:
        node = Node(name, parent, prefill_seconds(index, self._tokens), turns, self._now, held=True)
        self.nodes[name] = node
        if parent is not None:
            parent.children += 1
        return node

    def _evict(self) -> bool:
        node = self._policy.victim(self._now)
        if node is None:
            return False
        assert not node.held
        assert not node.children
        self._policy.ended(node, self._now, used=False)
        self._policy.remove(node)
        del self.nodes[node.name]
        parent = node.parent
        if parent is not None:
            parent.children -= 1
            if not parent.children and not parent.held:
                self._policy.add(parent)
        return True


def policies(turns: Sequence[Turn], budget: int) -> dict[str, Policy]:
    """Every rule that is compared, by name; the last one knows the future and is what no rule can beat by much."""
    return {
        "LRU": Policy(lambda node: node.last),
        "cost": Policy(lambda node: node.seconds, ages=True),
        "cost x uses": Policy(lambda node: node.seconds * node.uses, ages=True),
        "cost x turns": Policy(lambda node: node.seconds * node.turns, ages=True),
        "probation": Probation(budget),
        "hazard": Hazard(),
        "the future": Policy(_next_use(turns)),
    }


def _next_use(turns: Sequence[Turn]) -> Callable[[Node], float]:
    """Belady's rule: what is used again last, or never, goes first."""
    uses: defaultdict[int, list[int]] = defaultdict(list)
    for number, turn in enumerate(turns, start=1):
        for name in turn.blocks:
            uses[name].append(number)

    def rank(node: Node) -> float:
        at = uses[node.name]
        found = bisect_right(at, node.last)
        return -at[found] if found < len(at) else -float("inf")

    return rank
