"""What a first try gets wrong: one clear error on every rank, before anything is changed; or it simply works."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe.alike import require_alike
from moe.convert.upcycle import upcycle
from moe.errors import ContractError, ExchangeError, MoeConfigError
from moe.experts import StackedExperts
from moe.issue import own_group
from moe.layer import MoELayer
from moe.parallel import parallelize
from tests.moe_case import make_gate, make_layer, make_mesh, stacks, tokens_of
from tests.moe_models import ids_of, tiny_moe
from tests.spawn import run_ranks


def misused(info):
    mesh, said = make_mesh(2, 2, 1), []
    other = tiny_moe("mixtral")
    other.lm_head.weight.data += info.rank
    for model, options in (
        (other, {}),
        (DistributedDataParallel(tiny_moe("mixtral")), {}),
        (tiny_moe("mixtral"), {"plan": 4}),
        (tiny_moe("mixtral"), {"plan": {"model.layers.0.mlp.experts": "plan.json"}}),
        (tiny_moe("mixtral"), {"dp": None}),
        (tiny_moe("mixtral"), {"plan": 4} if info.rank else {}),
    ):
        before = [id(p) for p in model.parameters()]
        with pytest.raises(MoeConfigError) as caught:
            parallelize(model, mesh, **{"ep": "ep", "dp": "dp", **options})
        assert before == [id(p) for p in model.parameters()]
        said.append(str(caught.value))
    group = own_group(None, timeout_s=1)
    if info.rank == 0:  # the other does not come, as one that is lost or stopped
        with pytest.raises(ExchangeError, match=r"^rank 0, parallelize, comparing .*: a rank is lost or late: "):
            require_alike(None, {}, [group])
    return said


def test_what_differed_or_failed_silently_is_refused_on_every_rank():
    first, second = run_ranks(misused, 2)
    assert first == second
    weights, ddp, number, text, axis, one = first
    assert weights.startswith("ranks 0 and 1 differ in the weights of lm_head.weight: ")
    assert ddp.startswith("the model is inside DDP, which holds on to the weights that are replaced")
    assert number.startswith("plan is 4; give a LayerPlan, ")
    assert text.startswith("plan is {'model.layers.0.mlp.experts': 'plan.json'}; give a LayerPlan, ")
    assert axis == "the mesh has the axes pp, dp, ep, esp, but no None; one that spreads nothing has size 1"
    assert one.startswith("on rank 1: plan is 4; ")


def compiled(info):
    found = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = parallelize(tiny_moe("mixtral"), make_mesh(2, 2, 1), ep="ep", dp="dp")
        loss = wrap(model)(ids_of(info.rank), labels=ids_of(info.rank)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))  # with the experts, of which each rank has others
    with pytest.raises(MoeConfigError, match="give it the experts' weights"):
        model(ids_of(info.rank))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def test_a_compiled_model_gives_the_same():
    assert max(run_ranks(compiled, 2, timeout_s=120)) < 1e-10


def test_experts_that_do_not_count_themselves_or_are_too_few_are_named():
    with pytest.raises(ContractError, match=r"ModuleList has no int `num_experts`.*moe\.experts\.ModuleExperts"):
        MoELayer(make_gate(), nn.ModuleList())
    layer = make_layer()
    gate_up, down = stacks()
    layer.experts = StackedExperts(gate_up[:3], down[:3])
    with pytest.raises(ContractError, match="its gate has not as many experts as the ranks of ep hold together"):
        layer(tokens_of(0, [6]))
    layer = make_layer()
    layer.gate = nn.Identity()
    with pytest.raises(ContractError, match="its gate returned neither Assignments nor Slots"):
        layer(tokens_of(0, [6]))
    with pytest.raises(MoeConfigError, match="Linear cannot be upcycled; take a LlamaForCausalLM"):
        upcycle(nn.Linear(2, 2), 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MoeConfigError, match="MixtralForCausalLM has experts already; train it as it is"):
        upcycle(tiny_moe("mixtral"), 4)
