"""Issue queues: order, causes, deadlines, and two links in opposite orders."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from threading import Event, Timer, get_ident

import pytest
import torch
import torch.distributed as dist

from moe.errors import ExchangeError
from moe.issue import IssueQueue, Span, Ticket, own_group
from moe.lanes import Later
from tests.spawn import run_ranks


def test_what_is_submitted_runs_in_order_and_leaves_its_span():
    spans: list[Span] = []
    ran = []
    with IssueQueue(None, "inter", on_span=spans.append) as queue:
        tickets = [queue.submit(lambda i=i: ran.append(i) or i, layer="3", op=f"dispatch {i}") for i in range(50)]
        assert [t.result() for t in tickets] == list(range(50))
    assert ran == list(range(50))
    assert [(s.link, s.layer, s.op) for s in spans] == [("inter", "3", f"dispatch {i}") for i in range(50)]
    assert all(a.t1_ns <= b.t0_ns for a, b in pairwise(spans))


def test_a_failure_names_rank_layer_and_operation_and_breaks_the_queue():
    with IssueQueue(None, "inter") as queue:
        bad = queue.submit(lambda: 1 / 0, layer="model.layers.2", op="dispatch 1")
        after = queue.submit(lambda: pytest.fail("it ran"), layer="model.layers.2", op="dispatch 2")
        with pytest.raises(ExchangeError, match=r"rank 0, layer model.layers.2, dispatch 1 on the inter link: ZeroDiv"):
            bad.result()
        with pytest.raises(ExchangeError, match=r"dispatch 2.*not issued, for the link broke before.*dispatch 1"):
            after.result()


def test_an_operation_waits_for_what_it_needs_and_its_span_begins_then():
    spans: list[Span] = []
    with IssueQueue(None, "intra", on_span=spans.append) as queue:
        value = Ticket("the experts", 20.0)
        sums = [queue.submit(lambda x, i=i: x + i, needs=value, op=f"scatter {i}") for i in range(2)]
        doubled = queue.submit(lambda x: 2 * x, needs=sums[1], op="combine")
        time.sleep(0.01)
        there_ns = time.monotonic_ns()
        value.set_result(40)
        assert (sums[0].result(), doubled.result()) == (40, 82)
        lost = Ticket("the experts", 20.0)
        failed = queue.submit(lambda x: pytest.fail("it ran"), needs=lost, layer="3", op="scatter 2")
        lost.set_exception(ValueError("broken"))
        with pytest.raises(ExchangeError, match=r"layer 3, scatter 2 on the intra link: ValueError: broken"):
            failed.result()
    assert [s.op for s in spans] == ["scatter 0", "scatter 1", "combine"]
    assert all(s.t0_ns >= there_ns for s in spans)


def test_a_wait_has_a_deadline():
    held = threading.Event()
    queue = IssueQueue(None, "intra", timeout_s=0.05)
    ticket = queue.submit(lambda: held.wait(20), layer="7", op="gather 0")
    with pytest.raises(ExchangeError, match=r"layer 7, gather 0 on the intra link: not done after 0.05 s"):
        ticket.result()
    with pytest.raises(ExchangeError, match=r"still busy after 0.05 s"):
        queue.close()
    held.set()
    queue.close(20)


def test_a_closed_queue_refuses():
    queue = IssueQueue(None, "inter")
    queue.close()
    queue.close()
    with pytest.raises(ExchangeError, match="the queue is closed"):
        queue.submit(lambda: None)


def opposite_orders(info):
    """Rank 0 waits for the inter link first, rank 1 for the intra link: with a queue each, nobody deadlocks."""
    inter = IssueQueue(own_group(None, timeout_s=20), "inter", timeout_s=20)
    intra = IssueQueue(own_group(None, timeout_s=20), "intra", timeout_s=20)

    def total(queue, value):
        x = torch.tensor([value])
        return lambda: (dist.all_reduce(x, group=queue.group), x)[1].item()

    links = [inter, intra] if info.rank == 0 else [intra, inter]
    out = {}
    for link in links:
        out[link.name] = [link.submit(total(link, 10 * i + info.rank)) for i in range(5)]
    values = {name: [t.result() for t in tickets] for name, tickets in out.items()}
    inter.close()
    intra.close()
    return values


def test_two_links_in_opposite_orders():
    expected = [20 * i + 1 for i in range(5)]
    assert run_ranks(opposite_orders, 2) == [{"inter": expected, "intra": expected}] * 2


def one_rank_stays_away(info):
    group = own_group(None, timeout_s=1)
    queue = IssueQueue(group, "inter", timeout_s=10)
    if info.rank == 1:
        time.sleep(4)
        return None
    x = torch.ones(4)
    ticket = queue.submit(lambda: dist.all_reduce(x, group=group), layer="0", op="dispatch 0")
    began = time.monotonic()
    try:
        ticket.result()
    except ExchangeError as error:
        queue.close(5)
        return str(error), time.monotonic() - began


def test_a_lost_rank_is_an_error_in_bounded_time():
    text, waited_s = run_ranks(one_rank_stays_away, 2, fresh=True)[0]
    assert text.startswith("rank 0, layer 0, dispatch 0 on the inter link: ")
    assert text.endswith("; rank 1 may be lost or late: see its output")
    assert waited_s < 4


def test_a_call_runs_in_the_caller_s_thread_when_nothing_is_before_it_and_in_turn_otherwise():
    held, ran, spans = Event(), [], []
    with IssueQueue(None, "inter", on_span=spans.append) as queue:
        assert queue.call(get_ident, op="counts") == get_ident()
        assert queue.call(lambda x: x + 1, needs=Later(lambda: 1), layer="3") == 2
        first = queue.submit(lambda: ran.append(held.wait(20)), op="slice 0")
        Timer(0.1, held.set).start()
        assert queue.call(lambda: ran.append("call") or get_ident(), op="counts") != get_ident()
        first.result()
    assert ran == [True, "call"]
    assert [span.op for span in spans] == ["counts", "", "slice 0", "counts"]


def test_a_call_that_fails_breaks_the_queue_and_an_interrupt_reaches_the_caller():
    def interrupted():
        raise KeyboardInterrupt

    for fails, kind in ((lambda: 1 / 0, ExchangeError), (interrupted, KeyboardInterrupt)):
        with IssueQueue(None, "inter") as queue:
            with pytest.raises(kind):
                queue.call(fails, layer="3", op="exchange of counts")
            with pytest.raises(ExchangeError, match="layer 4, combine 0 on the inter link: not issued"):
                queue.call(lambda: pytest.fail("it ran"), layer="4", op="combine 0")
            with pytest.raises(ExchangeError, match="layer 3, exchange of counts on the inter link"):
                queue.submit(lambda: pytest.fail("it ran"), layer="4", op="combine 0").result()


def test_calls_among_submissions_keep_the_order_and_never_overlap():
    ran, inside = [], []

    def work(i):
        inside.append(i)
        assert inside == [i]
        time.sleep(0.0001 * (i % 3))
        inside.remove(i)
        ran.append(i)

    with IssueQueue(None, "inter") as queue:
        for i in range(300):
            (queue.call if i % 3 == 0 else queue.submit)(partial(work, i))
    assert ran == list(range(300))


def test_threads_that_call_and_submit_at_once_never_overlap_and_each_keeps_its_order():
    ran, inside = [], []

    def work(who, i):
        inside.append(i)
        assert inside == [i]
        time.sleep(0)
        inside.remove(i)
        ran.append((who, i))
        return who, i

    def give(queue, who):
        tickets = [(queue.call if (i + who) % 3 else queue.submit)(partial(work, who, i)) for i in range(200)]
        assert all((one if isinstance(one, tuple) else one.result()) == (who, i) for i, one in enumerate(tickets))

    with IssueQueue(None, "inter") as queue, ThreadPoolExecutor(4) as pool:
        for given in [pool.submit(give, queue, who) for who in range(4)]:
            given.result()
    assert all([i for w, i in ran if w == who] == list(range(200)) for who in range(4))


def test_what_ends_a_process_reaches_the_caller_and_breaks_the_queue():
    with IssueQueue(None, "inter") as queue:
        with pytest.raises(SystemExit, match="143"):
            queue.call(partial(sys.exit, 143), layer="3", op="dispatch 0")
        with pytest.raises(ExchangeError, match=r"broke before: rank 0, layer 3, dispatch 0 .*: SystemExit: 143"):
            queue.call(lambda: pytest.fail("it ran"))


def test_who_is_told_of_spans_and_raises_breaks_the_queue():
    gives = (lambda queue: queue.call(int, layer="3")), (lambda queue: queue.submit(int, layer="3").result())
    for give in gives:
        with IssueQueue(None, "inter", on_span=lambda _: 1 / 0, timeout_s=5) as queue:
            for text in (r"layer 3, .*: ZeroDivisionError", r"not issued, .* layer 3, .*: ZeroDivisionError"):
                with pytest.raises(ExchangeError, match=text):
                    give(queue)


def test_a_queue_that_was_failed_does_what_was_submitted_and_nothing_more():
    with IssueQueue(None, "inter") as queue:
        before = queue.submit(lambda: 5)
        queue.fail(RuntimeError("the hook is broken"), layer="3", op="experts")
        # Of this rank's own error no other rank is suspected.
        with pytest.raises(ExchangeError, match=r"broke before: rank 0, layer 3, experts .*: the hook is broken$"):
            queue.call(lambda: pytest.fail("it ran"), layer="4")
        assert before.result() == 5
    queue.fail(ValueError("closed"))
