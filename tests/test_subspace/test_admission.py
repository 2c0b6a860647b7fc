"""Who may start, decided without threads; and the threads' part, once."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.pipeline.admission import Admission, Tickets


def test_first_come_first_served() -> None:
    #  capacity 10:  a takes 4, b takes 4, c wants 8, d wants 1: d could go at once, but c asked before
    tickets = Tickets(10)
    assert [tickets.ask(name, size) for name, size in (("a", 4), ("b", 4), ("c", 8), ("d", 1))] == [
        ["a"],
        ["b"],
        [],
        [],
    ]
    assert tickets.give_back("a") == []
    assert tickets.give_back("b") == ["c", "d"]


def test_who_stops_waiting_lets_others_pass() -> None:
    tickets = Tickets(10)
    tickets.ask("a", 6)
    tickets.ask("b", 6)
    tickets.ask("c", 4)
    assert tickets.give_back("b") == ["c"]


def test_more_than_there_is_counts_as_all() -> None:
    tickets = Tickets(10)
    assert tickets.ask("a", 100) == ["a"]
    assert tickets.ask("b", 1) == []
    assert tickets.give_back("a") == ["b"]


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40))
def test_never_more_inside_than_there_is(moves: list[tuple[int, bool]]) -> None:
    tickets = Tickets(10)
    sizes: dict[int, int] = {}
    inside: list[int] = []
    order: list[int] = []
    for number, (size, leave) in enumerate(moves):
        sizes[number] = min(size, 10)
        admitted = tickets.ask(number, size)
        if leave and inside:
            admitted += tickets.give_back(inside.pop(0))
        inside += admitted  # type: ignore[arg-type]
        order += admitted  # type: ignore[arg-type]
        assert sum(sizes[name] for name in inside) <= 10
        assert tickets.free == 10 - sum(sizes[name] for name in inside)
    assert order == sorted(order)


def test_threads_wait_and_give_up() -> None:
    class Enough(Exception):
        pass

    def check() -> None:
        if over.is_set():
            raise Enough

    over, entered = threading.Event(), threading.Event()
    admission = Admission(10, check)

    def second() -> None:
        with admission.holding(8):
            entered.set()

    with admission.holding(8):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.05)
    waiting.join()
    assert entered.is_set()
    with admission.holding(8):
        over.set()
        with pytest.raises(Enough), admission.holding(8):
            pass
