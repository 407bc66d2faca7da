"""What waits: whatever comes, goes late or is withdrawn, in the order that a plain sorted list would give."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.pipeline.waiting import Waiting
from headrace.request import DEFAULT_PRIORITY, Withdrawal
from tests.pipeline.fakes import FakeSource

SOURCES = [FakeSource(), FakeSource()]
ADD = st.tuples(
    st.just("add"),
    st.sampled_from([1, 7, DEFAULT_PRIORITY, DEFAULT_PRIORITY, DEFAULT_PRIORITY, 200]),
    st.integers(0, 5),  # its deadline; 0 for none
    st.integers(1, 4),  # its rows
    st.sampled_from(SOURCES),
)
TAKE = st.tuples(st.just("take"), st.integers(0, 3))
LATE = st.tuples(st.just("late"), st.integers(0, 7))
WITHDRAW = st.tuples(st.just("withdraw"), st.lists(st.integers(0, 40), max_size=4))
GONE = st.tuples(st.just("gone"), st.sampled_from(SOURCES))


class Model:
    """The same by a list that is sorted anew each time."""

    def __init__(self):
        self.tickets = []

    def add(self, ticket):
        self.tickets = sorted([*self.tickets, ticket], key=lambda each: each.priority)

    def take_if(self, chosen):
        taken = [ticket for ticket in self.tickets if chosen(ticket)]
        self.tickets = [ticket for ticket in self.tickets if not chosen(ticket)]
        return taken


def added(source, index, priority, deadline_ns, rows):
    ticket = source.ticket(index, rows, received_ns=index)
    ticket.priority, ticket.deadline_ns = priority, deadline_ns
    return ticket


@given(st.lists(st.one_of(ADD, ADD, ADD, TAKE, LATE, WITHDRAW, GONE), max_size=60))
def test_whatever_happens_it_is_a_list_sorted_by_priority_and_arrival(steps):
    waiting, model, sent = Waiting(), Model(), []
    for what, *details in steps:
        if what == "add":
            priority, deadline_ns, rows, source = details
            ticket = added(source, len(sent), priority, deadline_ns, rows)
            sent.append(ticket)
            waiting.add(ticket)
            model.add(ticket)
        elif what == "take":
            count = min(details[0], len(model.tickets))
            first = model.tickets[:count]
            assert waiting.take(count) == model.take_if(lambda ticket, first=first: ticket in first)
        elif what == "late":
            late = model.take_if(lambda ticket, now_ns=details[0]: 0 < ticket.deadline_ns < now_ns)
            told = waiting.take_late(details[0])
            assert {ticket.index for ticket in told} == {ticket.index for ticket in late}
            assert [ticket.deadline_ns for ticket in told] == sorted(ticket.deadline_ns for ticket in late)
        elif what == "withdraw":
            words = [Withdrawal(each.source, (each.index, each.first_row)) for each in sent if each.index in details[0]]
            words.append(Withdrawal(SOURCES[0], (1, -1)))  # of no such request
            assert waiting.take_withdrawn(words) == model.take_if(
                lambda each, numbers=details[0]: each.index in numbers
            )
        else:
            source = details[0]
            assert waiting.take_withdrawn([Withdrawal(source, None)]) == model.take_if(
                lambda ticket, source=source: ticket.source is source
            )
        assert list(waiting.each_rows()) == [ticket.rows for ticket in model.tickets]
        assert waiting.rows == sum(ticket.rows for ticket in model.tickets)
        if model.tickets:
            assert waiting.oldest_ns() == min(ticket.received_ns for ticket in model.tickets)
    assert waiting.take_all() == model.tickets
    assert waiting.rows == 0


def test_without_deadlines_nothing_is_kept_of_them_and_with_them_little():
    waiting, source = Waiting(), SOURCES[0]
    waiting.add(source.ticket(0))
    assert not waiting.deadlines
    waiting.add(added(source, 1, DEFAULT_PRIORITY, 10**9, 1))
    for index in range(2, 2000):  # each is launched long before it is late
        waiting.add(added(source, index, 1, 10**9, 1))
        waiting.take(1)
    assert 0 < len(waiting.deadlines) < 100
    waiting.take(2)
    assert not waiting.deadlines
