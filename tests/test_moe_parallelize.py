"""transformers models with their experts spread over ranks, against the same models on one."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe.config import MoeConfig
from moe.convert import hf
from moe.errors import MoeConfigError, MoeError
from moe.parallel import expert_layers, parallelize
from moe.plan import LayerPlan
from moe.state import load_state_dict, state_dict, to_global, to_local
from moe.sync import average_gradients
from tests.moe_case import make_mesh
from tests.moe_models import FAMILIES, ids_of, tiny_moe
from tests.spawn import run_ranks

EXACT = 1e-10
PLAN = LayerPlan(2, 3)


def spread(model, info, ep, esp=1, plan=PLAN):
    mesh = make_mesh(info.world_size, ep, esp)
    return parallelize(model, mesh, ep="ep", esp="esp", dp="dp", plan=plan)


def loss_of(model, ids):
    return model(ids, labels=ids).loss


def one_process_step(family, world_size):
    """Gradients of the mean over all ranks' losses, and the logits of each."""
    model = tiny_moe(family)
    losses = [loss_of(model, ids_of(r)) for r in range(world_size)]
    (sum(losses) / world_size).backward()
    return model, [model(ids_of(r)).logits.detach() for r in range(world_size)]


def compare(info, ep, esp):
    errors = {}
    for family in FAMILIES:
        whole, logits = one_process_step(family, info.world_size)
        model = spread(tiny_moe(family), info, ep, esp)
        got = model(ids_of(info.rank)).logits
        errors[f"{family} logits"] = float((got - logits[info.rank]).detach().abs().max())
        loss_of(model, ids_of(info.rank)).backward()
        average_gradients(model)
        grads = {name: p.grad for name, p in model.named_parameters()}
        expected = to_local(model, {name: p.grad for name, p in whole.named_parameters()})
        errors |= {f"{family} {n}": float((grads[n] - expected[n]).abs().max()) for n in grads}
        assert all(p.is_expert == (".experts." in n) for n, p in model.named_parameters() if hasattr(p, "is_expert"))
        for layer in expert_layers(model).values():
            layer.runner.lanes.close()
    return errors


@pytest.mark.parametrize(("ep", "esp"), [(4, 1), (2, 2), (2, 1)])
def test_logits_and_all_gradients_equal_one_process_on_the_global_batch(ep, esp):
    """All families; with ep = 2 of 4 ranks, dp = 2 has copies of the experts."""
    for errors in run_ranks(compare, 4, ep, esp, timeout_s=120):
        worst = max(errors, key=errors.get)
        assert errors[worst] < EXACT, (worst, errors[worst])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_in_fp32_agrees_with_transformers(family):
    """Its default is grouped_mm, as ours; sums per token are taken in the same order."""
    for got, expected in run_ranks(fp32_logits, 1, family)[0]:
        assert torch.allclose(got, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def fp32_logits(info, family):
    """Also with experts in bf16, to whose dtype transformers' grouped_mm casts rows."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_moe(family, dtype=torch.float32)
        for name, param in model.named_parameters():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                param.data = param.data.to(dtype)
        with torch.no_grad():
            expected = model(ids_of(0)).logits
            found.append((spread(model, info, 1)(ids_of(0)).logits, expected))
    return found


def save_round_trip(info, folder, family):
    model = spread(tiny_moe(family, dtype=torch.float32), info, 2)
    proof = hf.save_pretrained(model, folder)
    layer = next(iter(expert_layers(model).values()))
    with torch.no_grad():  # what a rank holds is what must be found again
        layer.down_proj += info.rank
    return proof, {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in state_dict(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_folder_is_proven_and_loads_in_transformers(tmp_path, family):
    (proof, _), (other, _) = run_ranks(save_round_trip, 2, str(tmp_path), family)
    assert proof == other
    original = tiny_moe(family, dtype=torch.float32)
    layers = sum(".experts.down_proj" in name for name in original.state_dict())
    assert proof.num_expert_tensors == layers * 4 * 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def damage(path, change):
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def first_expert(tensors, number="1"):
    return next(n for n in tensors if f".experts.{number}." in n)


def swap(tensors):
    a = first_expert(tensors)
    b = a.replace(".experts.1.", ".experts.2.")
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(first_expert(t)), "1 tensors are missing, the first model.layers.0.mlp.experts.1"),
        (swap, "2 tensors are different, the first model.layers.0.mlp.experts.1"),
        (lambda t: t.update({first_expert(t).replace(".1.", ".9."): torch.ones(2)}), "1 tensors are unknown"),
    ],
)
def test_the_proof_finds_experts_that_are_dropped_swapped_or_made_up(tmp_path, change, text):
    model = tiny_moe("qwen3_moe", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    held = run_ranks(held_by, 1)[0]
    hf._prove(tmp_path, held, model)
    damage(tmp_path, change)
    with pytest.raises(MoeError, match=text):
        hf._prove(tmp_path, held, model)


def held_by(info):
    return hf._of_model(spread(tiny_moe("qwen3_moe", dtype=torch.float32), info, 1))


def save_shards(info, folder, ep, esp):
    """Train one step with momentum, and save model and optimizer as shards of what the DTensors say."""
    model = spread(tiny_moe("mixtral"), info, ep, esp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of(model, ids_of(info.rank)).backward()
    average_gradients(model)
    optimizer.step()
    slots = {f"optim.{n}.momentum_buffer": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    flat = {**state_dict(model), **to_global(model, slots)}
    shards = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in flat.items()}
    rows = {n: list(v.shape) for n, v in flat.items() if isinstance(v, DTensor)}
    assert all(v.placements == (Shard(0),) for v in flat.values() if isinstance(v, DTensor))
    mesh = make_mesh(info.world_size, ep, esp)
    if mesh["dp"].get_local_rank() == mesh["esp"].get_local_rank() == 0:
        place = mesh["ep"].get_local_rank()
        save_file({n: v.detach().clone().contiguous() for n, v in shards.items()}, f"{folder}/{place}.safetensors")
        (folder_json := f"{folder}/{place}.json")
        with open(folder_json, "w") as file:
            json.dump(rows, file)
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in flat.items()}


def load_shards(info, folder, saved_ep, ep, esp):
    """Put the shards together, each by its place, and load them at another number of ranks."""
    files = [load_file(f"{folder}/{i}.safetensors") for i in range(saved_ep)]
    with open(f"{folder}/0.json") as file:
        expert_shapes = json.load(file)
    whole = {n: torch.cat([f[n] for f in files]) if n in expert_shapes else v for n, v in files[0].items()}
    assert all(list(whole[n].shape) == shape for n, shape in expert_shapes.items())
    model = spread(tiny_moe("mixtral", initializer_range=0.1), info, ep, esp)
    weights = {n: v for n, v in whole.items() if not n.startswith("optim.")}
    load_state_dict(model, weights)
    slots = to_local(model, {n: v for n, v in whole.items() if n.startswith("optim.")})
    for name, param in model.named_parameters():
        assert slots[f"optim.{name}.momentum_buffer"].shape == param.shape
    flat = {**state_dict(model), **to_global(model, slots)}
    logits = model(ids_of(0)).logits
    return logits.detach(), {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in flat.items()}


@pytest.mark.parametrize(("saved", "loaded"), [((4, 1), (2, 1)), ((2, 1), (4, 1)), ((1, 1), (2, 2)), ((2, 2), (1, 1))])
def test_state_saved_at_one_ep_degree_loads_at_another(tmp_path, saved, loaded):
    first = run_ranks(save_shards, saved[0] * saved[1], str(tmp_path), *saved)[0]
    logits, second = run_ranks(load_shards, loaded[0] * loaded[1], str(tmp_path), saved[0], *loaded)[0]
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = tiny_moe("mixtral")
    model.load_state_dict({n: v for n, v in first.items() if not n.startswith("optim.")})
    assert torch.allclose(model(ids_of(0)).logits, logits, rtol=0, atol=EXACT)


def refusals(info):
    mesh, said = make_mesh(3, 3, 1), []
    model = tiny_moe("mixtral")
    before = copy.deepcopy(model.state_dict())
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for broken, axes in (
        (model, {"ep": "ep", "dp": "dp"}),
        (model, {"ep": "experts", "dp": "dp"}),
        (model, {"ep": "esp", "esp": "ep", "dp": "dp"}),
        (model, {"ep": "dp", "dp": "ep", "plan": {"model.layers.7.mlp.experts": PLAN}}),
        (dense, {"ep": "ep", "dp": "dp"}),
    ):
        with pytest.raises(MoeConfigError) as caught:
            parallelize(broken, mesh, **axes)
        said.append(str(caught.value))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    parallelize(model, mesh, ep="dp", dp="ep")
    with pytest.raises(MoeConfigError) as caught:
        parallelize(model, mesh, ep="dp", dp="ep")
    with pytest.raises(MoeConfigError, match=r"missing \['lm_head.weight'\], unknown \['x'\]"):
        load_state_dict(model, {**{n: v for n, v in before.items() if n != "lm_head.weight"}, "x": 1})
    dist.barrier()
    return [*said, str(caught.value)]


def differing(info):
    """One rank after another is given something else; what every rank gets to hear, and that nothing was changed."""
    mesh, said = make_mesh(4, 2, 1), []
    for family, theirs, options in (
        ("mixtral", {"num_local_experts": 8}, {}),
        ("mixtral", {"num_local_experts": 5}, {}),
        ("mixtral", {"dtype": torch.float32}, {}),
        ("olmoe", {"num_hidden_layers": 3}, {}),
        ("mixtral", {}, {"plan": PLAN}),
        ("mixtral", {}, {"config": MoeConfig(exchange="2d", node_ranks=2)}),
        ("mixtral", {}, {"plan": {"nowhere": PLAN}}),
        ("frozen", {}, {}),
    ):
        odd = info.rank == len(said) % 4
        model = tiny_moe("mixtral" if family == "frozen" else family, **(theirs if odd else {}))
        model.requires_grad_(not odd or family != "frozen")
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(MoeConfigError) as caught:
            parallelize(model, mesh, ep="ep", dp="dp", **(options if odd else {}))
        said.append(str(caught.value))
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    for theirs in ({"ep": "experts", "dp": "dp"}, {"ep": "dp", "dp": "ep"}, {"ep": "ep", "esp": "esp", "dp": "dp"}):
        with pytest.raises(MoeConfigError) as caught:
            parallelize(model, mesh, **(theirs if info.rank == 1 else {"ep": "ep", "dp": "dp"}))
        said.append(str(caught.value))
    for axes in ({"ep": "ep", "dp": "ep"}, {"ep": "ep", "esp": "dp", "dp": "dp"}):
        with pytest.raises(MoeConfigError, match="each must be an axis of its own"):
            parallelize(model, mesh, **axes)
    return said


def test_ranks_with_other_models_plans_or_settings_all_hear_of_it():
    every = run_ranks(differing, 4)
    assert all(said == every[0] for said in every)
    name = "model.layers.0.mlp.experts"
    texts = (
        f"ranks 0 and 1 differ in experts of {name}: [8, 16, 16] of torch.float64 and [8, 16, 8] of torch.float64 and ",
        f"on rank 1: {name}: 5 experts do not split over 2 ranks",
        f"ranks 0 and 2 differ in experts of {name}: [4, 16, 16] of torch.float64",
        f"ranks 0 and 3 differ in layers: {name}, model.layers.1.mlp.experts and {name}, ",
        f"ranks 0 and 1 differ in plan of {name}: (2, 3, 'fifo', 1, 1, 0) and (1, 1, 'fifo', 1, 1, 0); give every",
        "ranks 0 and 1 differ in settings: MoeConfig(exchange='direct'",
        "on rank 2: there are plans for nowhere",
        f"ranks 0 and 3 differ in experts of {name}: [4, 16, 16] of torch.float64 and [4, 16, 8] of torch.float64 and ",
        "on rank 1: the mesh has the axes pp, dp, ep, esp, but no 'experts'",
        "ranks 0 and 1 differ in axes: ep=ep, esp=None, dp=dp and ep=dp, esp=None, dp=ep; give every rank the same",
        "ranks 0 and 1 differ in axes: ep=ep, esp=None, dp=dp and ep=ep, esp=esp, dp=dp; give every rank the same",
    )
    for said, text in zip(every[0], texts, strict=True):
        assert said.startswith(text), said


def test_bad_input_is_one_clear_error_and_changes_nothing():
    for said in run_ranks(refusals, 3):
        assert "model.layers.0.mlp.experts: 4 experts do not split over 3 ranks; choose an ep axis" in said[0]
        assert said[1].startswith("the mesh has the axes pp, dp, ep, esp, but no 'experts'; one that spreads nothing")
        assert "an inner width of 8 does not split over 3 ranks; choose an esp axis" in said[2]
        assert "there are plans for model.layers.7.mlp.experts, but the layers are model.layers.0" in said[3]
        assert "LlamaForCausalLM has no stacked experts" in said[4]
        assert "this model is expert-parallel already" in said[5]
