"""First come, first served; and in front for who interrupts."""

from __future__ import annotations

import threading

from agent_memory_core.coordination.line import Line


def test_those_who_wait_come_in_their_order_and_the_first_before_them() -> None:
    line, order = Line(), []
    inside = line.join()
    places = {"a": line.join(), "b": line.join(), "first": line.join(first=True)}

    def enter(name: str) -> None:
        with places[name]:
            order.append(name)

    threads = [threading.Thread(target=enter, args=(name,)) for name in places]
    for thread in threads:
        thread.start()
    assert order == []
    inside.leave()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "a", "b"]


def test_a_place_is_given_back_once_and_one_who_waits_may_leave() -> None:
    line = Line()
    first, second, third = line.join(), line.join(), line.join()
    second.leave()
    first.leave()
    first.leave()
    assert third.is_next.is_set()
    assert not second.is_next.is_set()
