"""What runs the blocks of docs/moe.md and docs/moe_planner.md."""

import time

import torch
import torch.distributed as dist
from typer.testing import CliRunner

from moe import cli
from moe.cost import LayerLoad, Line, Profile
from moe.gradients import GradientReducer
from moe.issue import IssueQueue, own_group
from moe.plan import LayerPlan
from moe.planner import plan_layer
from moe.profiler import Links, ProfileConfig, agree_on_plans, make_profile
from tests.docs_blocks import Run, execute
from tests.moe_case import EXPERTS, WIDTH, lanes_of, make_mesh, sliced, stacks, tokens_of
from tests.moe_models import ids_of, tiny_moe
from tests.spawn import run_ranks

PAGE, PLANNER = "docs/moe.md", "docs/moe_planner.md"
PLAN = LayerPlan(2, 3)
SMALL = ProfileConfig(most_bytes=1 << 18, least_rows=16, most_rows=64, sizes=3, tries=2)


def parallel_rank(info, code):
    model = tiny_moe("mixtral")
    names = {
        "model": model, "mesh": make_mesh(info.world_size, 2, 1), "plan": PLAN, "input_ids": ids_of(info.rank),
        "labels": ids_of(info.rank), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    names = execute(PAGE, code, names)
    assert not torch.equal(before, model.lm_head.weight)
    return float(names["loss"])


def parallel(folder, texts):
    expected = [float(tiny_moe("mixtral")(ids_of(r), labels=ids_of(r)).loss) for r in (0, 1)]
    found = run_ranks(parallel_rank, 2, texts[0])
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-10


def layer_rank(info, code):
    from moe.experts import StackedExperts

    lanes = lanes_of(make_mesh(info.world_size, 2, 1))
    own = slice(info.rank * EXPERTS // 2, (info.rank + 1) * EXPERTS // 2)
    gate_up, down = sliced(*stacks(torch.float32), lanes)
    names = {
        "width": WIDTH, "num_experts": EXPERTS, "experts": StackedExperts(gate_up[own], down[own]), "lanes": lanes,
        "plan": PLAN, "x": tokens_of(info.rank, [9, 7]).float(),
    }  # fmt: skip
    found = execute(PAGE, code, names)
    return tuple(found["hidden"].shape), bool(torch.isfinite(found["hidden"]).all())


def layer(folder, texts):
    assert run_ranks(layer_rank, 2, texts[0]) == [((9, WIDTH), True), ((7, WIDTH), True)]


def known_profile():
    link, intra = Line(1e-3, 1e-8), Line(1e-3, 4e-9)
    return Profile(
        all_to_all=link, all_reduce=link, all_gather=intra, reduce_scatter=intra, expert_forward=Line(1e-5, 2e-5),
        expert_backward=Line(1e-5, 4e-5), residuals={"all_to_all": 0.03},
    )  # fmt: skip


def planned(folder, texts):
    commands, expected = texts
    (folder / "profile.json").write_text(known_profile().to_json())
    (command,) = [line for line in commands.splitlines() if line.startswith("python -m moe plan")]
    assert CliRunner().invoke(cli.app, command.split()[3:]).stdout == expected


def profile_rank(info, code):
    inter, intra = (IssueQueue(own_group(None, timeout_s=30), name, timeout_s=30) for name in ("inter", "intra"))

    def measured(profile_of, *places, expert_forward, expert_backward, config):
        assert (expert_forward, expert_backward, config) == (..., ..., ProfileConfig())
        waits = {name: lambda rows: lambda: time.sleep(rows * 2e-5) for name in ("expert_forward", "expert_backward")}
        return make_profile(*places, **waits, config=SMALL)

    def load(**sizes):
        assert set(sizes) == {"exchange_bytes", "gather_bytes", "expert_rows", "gradient_bytes"}
        return LayerLoad(exchange_bytes=5e5, gather_bytes=1e6, expert_rows=100, gradient_bytes=1e5)

    links = Links(inter=inter, ep=inter.group, intra=intra, esp=intra.group, gradients=inter.group)
    names = {
        "links": links, "ProfileConfig": ProfileConfig, "plan_layer": plan_layer, "LayerLoad": load,
        "agree_on_plans": agree_on_plans, "make_profile": lambda *places, **named: measured(None, *places, **named),
    }  # fmt: skip
    found = execute(PLANNER, code, names)["plan"].to_json()
    inter.close()
    intra.close()
    return found


def profiled(folder, texts):
    first, second = run_ranks(profile_rank, 2, texts[0])
    assert first == second


def reducer_rank(info, code):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    whole, queue = torch.nn.Linear(4, 3), IssueQueue(own_group(None, timeout_s=30), "inter", timeout_s=30)
    whole.load_state_dict(model.state_dict())
    data = [torch.randn(5, 4, generator=torch.Generator().manual_seed(n)) for n in range(2 * info.world_size)]

    class Place:
        """Stands for a layer whose backward has time for gradients, and lanes."""

        runner, inter = torch.nn.Identity(), queue

    def loss(module, x):
        return module(x).square().mean()

    names = {
        "model": model, "layer": Place, "lanes": Place, "loss": loss, "dp_group": dist.group.WORLD, "ep_group": None,
        "first": data[2 * info.rank], "last": data[2 * info.rank + 1], "GradientReducer": GradientReducer,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip
    execute(PLANNER, code, names)
    for x in data:
        (loss(whole, x) / info.world_size).backward()
    torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    queue.close()
    return max(float((p - q).abs().max()) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


def reducer(folder, texts):
    assert max(run_ranks(reducer_rank, 2, texts[0])) < 1e-6


RUNS = [
    Run(PAGE, ("moe.parallelize(",), parallel),
    Run(PAGE, ("layer = MoELayer(",), layer),
    Run(PLANNER, ("python -m moe plan --profile", "ready order promises"), planned),
    Run(PLANNER, ("profile = make_profile(",), profiled),
    Run(PLANNER, ("reducer = GradientReducer(",), reducer),
]
