"""Each illness is made on purpose, and found by name; a healthy model has no findings."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moe
from moe.audit import audit_aux_loss, audit_gradients
from moe.convert.upcycle import upcycle
from moe.errors import MoeConfigError
from moe.parallel import expert_layers, parallelize
from moe.sync import average_gradients
from tests.moe_case import make_mesh
from tests.moe_models import ids_of, tiny_moe
from tests.spawn import run_ranks
from tests.tiny import tiny_model


def trained(info, ep, model=None):
    model = parallelize(model or tiny_moe("mixtral"), make_mesh(info.world_size, ep, 1), ep="ep", esp="esp", dp="dp")
    ids = ids_of(info.rank)
    model(ids, labels=ids).loss.backward()
    return model


def texts(findings):
    return [str(finding) for finding in findings]


def examine(info):
    """Make one illness after the other on rank 1 only; every rank must hear of each."""
    model = trained(info, 2)
    name, layer = next(iter(expert_layers(model).items()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average_gradients(model)
    said = {"healthy": texts(moe.doctor(model, optimizer=optimizer))}
    if info.rank == 1:
        layer.down_proj.grad[1, 3] = float("nan")
        layer.gate_up_proj.data[0] = layer.gate_up_proj.data[1]
        layer.down_proj.data[0] = layer.down_proj.data[1]
        del layer.gate_up_proj.is_expert
        optimizer.param_groups[0]["params"].append(layer.down_proj)
    layer.rows_per_expert_E[2] = 0
    model.model.layers[1].mlp.gate.weight.grad = None
    said["ill"] = texts(moe.doctor(model, optimizer=optimizer))
    model.zero_grad(set_to_none=False)
    said["zeros"] = [text for text in texts(moe.doctor(model)) if text.startswith("idle")]
    if info.rank == 1:
        layer.gate_up_proj.data[0] += 1
        model.model.layers[1].mlp.gate.weight.data[0, 0] = float("inf")
    said["parts"] = [text for text in texts(moe.doctor(model)) if text.startswith(("duplicated", "NaN"))]
    return name, said


def test_illnesses_of_one_rank_are_found_by_name_on_all():
    results = run_ranks(examine, 2)
    assert results[0] == results[1]
    name, said = results[0]
    assert said["healthy"] == said["zeros"] == []
    for text in (
        f"NaN rows: {name}.down_proj, expert 3: 1 rows of its gradient are NaN or infinite",
        f"duplicated expert: {name}, expert 3: it equals expert 2",
        f"unmarked expert: {name}.gate_up_proj: it is not marked is_expert",
        f"expert in optimizer: {name}.down_proj: it is 2 times in the optimizer",
        "idle router: model.layers.1.mlp.gate: its gradient is zero or missing, so it learns nothing",
        f"dead expert: {name}, expert 2: no rank sent it a row in the last forward",
    ):
        assert sum(text in line for line in said["ill"]) == 1, (text, said["ill"])
    assert len(said["ill"]) == 6
    whole, part = said["parts"]
    assert whole == "NaN rows: model.layers.1.mlp.gate.weight: its weight has values that are NaN or infinite"
    assert f"{name}, expert 3: its down_proj equals that of expert 2" in part


def scales(info):
    whole = tiny_moe("mixtral")
    losses = [whole(ids_of(r), labels=ids_of(r)).loss for r in range(info.world_size)]
    (sum(losses) / info.world_size).backward()
    model = trained(info, 2)
    average_gradients(model)
    right = texts(audit_gradients(model, whole.named_parameters()))
    assert right == texts(moe.doctor(model, reference=dict(whole.named_parameters())))
    for layer in expert_layers(model).values():
        for param in layer.parameters():
            param.grad *= 2  # as if divided by dp only
    wrong = texts(audit_gradients(model, whole.named_parameters()))
    assert wrong == texts(moe.doctor(model, reference=whole.named_parameters()))
    layer = next(iter(expert_layers(model).values()))
    for param in model.parameters():
        if getattr(param, "is_expert", False):
            param.grad /= 2
    layer.down_proj.grad[1] *= 2
    one = texts(audit_gradients(model, whole.named_parameters()))
    assert len(one) == 2  # of the second expert on either rank of ep
    assert "down_proj, expert 1: it is 2 times" in one[0]
    layer.down_proj.grad[1] /= 2
    grad = layer.down_proj.grad[0]
    other = torch.randn_like(grad)
    other -= grad * (other * grad).sum() / (grad * grad).sum()
    grad += other * (grad.norm() / other.norm() / 2)
    model.lm_head.weight.grad *= 4
    (noisy, *_, dense) = texts(audit_gradients(model, whole.named_parameters()))
    assert "lm_head.weight: it is 4 times that of one process; divide the sum over all axes by their ranks" in dense
    assert "down_proj: the scale is that of one process, and it is 50% off" in noisy, noisy
    model.zero_grad()
    return right, wrong, texts(audit_gradients(model, whole.named_parameters()))


def test_gradient_scale_is_compared_with_one_process():
    for right, wrong, without in run_ranks(scales, 4, timeout_s=120):
        assert right == []
        assert len(wrong) == len(without) == 4
        assert "down_proj: it is 2 times that of one process; divide the sum over dp by the ranks" in wrong[1]
        assert "there is no gradient to compare" in without[0]


def in_ddp(info):
    model = trained(info, 1)
    found = texts(moe.doctor(DistributedDataParallel(model)))
    experts = [n for n, p in model.named_parameters() if getattr(p, "is_expert", False)]
    model._ddp_params_and_buffers_to_ignore = experts
    dist.barrier()
    ignored = texts(moe.doctor(DistributedDataParallel(model)))
    if info.rank == 1:
        next(iter(expert_layers(model).values())).down_proj.data[0] += 1
    return found, ignored, texts(moe.doctor(model))


def test_experts_inside_ddp_and_copies_that_differ_are_found():
    for found, ignored, differing in run_ranks(in_ddp, 2):
        assert len(found) == 4
        assert all(line.startswith("experts inside DDP: model: model.layers.") for line in found)
        assert ignored == []
        assert differing == [
            "copies differ: model.layers.0.mlp.experts, expert 0: its copies on the dp axis differ; "
            "average expert gradients over dp"
        ]


def upcycled(info):
    dense = tiny_model()
    model = upcycle(dense, 4)
    model.set_experts_implementation("eager")
    return texts(moe.doctor(trained(info, 1, model)))


def test_upcycled_experts_are_called_copies_until_they_are_trained():
    found = run_ranks(upcycled, 1)[0]
    assert sum("it equals expert 0, which is so right after upcycling" in line for line in found) == 6


def idle(info):
    """One expert a token: Mixtral's weight of it is one whatever the router says. Rank 1 alone has no gradient of 0."""
    found = []
    for family, top_k in (("mixtral", 1), ("olmoe", 1), ("mixtral", 2)):
        model = trained(info, 2, tiny_moe(family, num_experts_per_tok=top_k))
        found.append([line for line in texts(moe.doctor(model)) if line.startswith("idle router")])
        if family == "mixtral" and top_k == 1 and info.rank == 1:
            model.model.layers[0].mlp.gate.weight.grad += 1
        found.append([line for line in texts(moe.doctor(model)) if line.startswith("idle router")])
    return found


def test_routers_that_learn_nothing_are_found():
    for one, other, *fine in run_ranks(idle, 2):
        assert [line.partition(":")[2].split(":")[0] for line in one] == [
            " model.layers.0.mlp.gate", " model.layers.1.mlp.gate",
        ]  # fmt: skip
        assert "with one expert a token, whose weight is always one, it stays so" in one[0]
        assert other == one[1:]
        assert fine == [[]] * 4


def aux_losses(scale):
    model = tiny_moe("mixtral")
    gates = [p for n, p in model.named_parameters() if "mlp.gate" in n]

    def loss(coefficient):
        out = model(ids_of(0), labels=ids_of(0), output_router_logits=True)
        main = out.loss - model.router_aux_loss_coef * out.aux_loss
        return main + scale(coefficient) * out.aux_loss

    def alone():
        return model(ids_of(0), output_router_logits=True).aux_loss

    return texts(audit_aux_loss(loss, gates, coefficient=0.1, alone=alone))


def test_aux_loss_must_enter_once():
    assert aux_losses(lambda c: c) == []
    assert "twice the coefficient gives 4.00 times the gradient" in aux_losses(lambda c: c * c)[0]
    assert "gives the gates no gradient" in aux_losses(lambda c: 0)[0]
    assert "its gradient is 2.00 times the coefficient times that of it alone" in aux_losses(lambda c: 2 * c)[0]


def test_other_models_are_refused():
    with pytest.raises(MoeConfigError, match=r"call moe.parallelize\(model, mesh, ...\) first"):
        moe.doctor(nn.Linear(1, 1))
