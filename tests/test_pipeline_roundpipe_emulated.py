"""Emulated devices: the real runtime with waits in the place of layers, against the simulator."""

import pytest
import torch.distributed as dist

from pipeline.actions import COMPUTE
from pipeline.costs import Costs
from pipeline.roundpipe.compute import WaitCompute
from pipeline.roundpipe.emulate import emulated_layers, waits
from pipeline.roundpipe.lowering import slot_schedule, without_optimizer
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from pipeline.tracing import Trace
from tests.roundpipe_cases import open_worker
from tests.spawn import run_ranks

SLOTS = Slots(forward=(2, 2), fused=1, backward=(1, 1, 2))
COSTS = Costs(forward_s=((0.004,) * 4 + (0.012,),), backward_s=((0.008,) * 4 + (0.024,),))


def rank_waits(info, plan):
    trace = Trace(info.rank)
    schedule = without_optimizer(slot_schedule(SLOTS, devices=info.world_size, costs=COSTS, open_slots=2, **plan))
    worker = open_worker(
        emulated_layers(5), SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=info.world_size,
        microbatches=plan["microbatches"], compute=WaitCompute(waits(schedule, COSTS), 5), trace=trace,
    )  # fmt: skip
    times = []
    for _ in range(3):
        dist.barrier()
        trace.clear()
        worker.run(schedule)
        events = [e for e in trace.events if e.lane == "compute"]
        times.append((min(e.t0_ns for e in events), max(e.t1_ns for e in events)))
    worker.close()
    done = [(e.name, e.mb) for e in events]
    return times, done, [(a.label, a.microbatch) for a in schedule.of(info.rank) if a.op in COMPUTE]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_of_waits_takes_no_less_than_the_simulator_says_and_does_what_the_schedule_says(ranks):
    plan = {"microbatches": 4, "rounds": 2}
    results = run_ranks(rank_waits, ranks, plan)
    schedule = slot_schedule(SLOTS, devices=ranks, costs=COSTS, open_slots=2, **plan)
    predicted_s = simulate(without_optimizer(schedule), COSTS).makespan_s
    for repeat in range(3):
        begun = min(times[repeat][0] for times, *_ in results)
        ended = max(times[repeat][1] for times, *_ in results)
        # Waits never end early; how late they end is the benchmark's business, on a quiet machine.
        assert (ended - begun) / 1e9 >= predicted_s * 0.999
    for _, done, expected in results:
        assert done == expected
