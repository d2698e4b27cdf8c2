"""Optimizers: groups, rates, the bits of torch's own, and Muon against its definition."""

import math

import pytest
import torch

from fromzero import kernels, machine, networks, optim
from fromzero.recipe import NetworkRecipe, OptimizerRecipe


def small_network(**fields):
    return networks.build(NetworkRecipe(channels=[[6], [8]], dense=[5], **fields), (16, 16, 3), 4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_each_kind_of_weight_has_its_rate(name):
    model = small_network(batch_norm=True, whitening=2)
    recipe = OptimizerRecipe(name=name, learning_rate=0.2, head_learning_rate=0.6, bias_learning_rate=0.05)
    optimizer = optim.make_optimizer(recipe, model)
    optim.set_learning_rate(optimizer, 0.1)
    names = {weight: name for name, weight in model.named_parameters()}
    rates = {names[weight]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert rates == pytest.approx(
        {
            "conv2d_1.weight": 0.1,
            "conv2d_2.weight": 0.1,
            "dense_1.weight": 0.1,
            "batch_normalization_1.bias": 0.025,
            "batch_normalization_2.bias": 0.025,
            "dense_1.bias": 0.025,
            "predictions.bias": 0.025,
            "predictions.weight": 0.3,
        }
    )  # the whitening layer is fixed
    plain = optim.make_optimizer(OptimizerRecipe(name=name, learning_rate=0.2), model)
    assert {group["share"] for group in plain.param_groups} == {1.0}


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_orthogonalised_keeps_directions_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = optim.orthogonalised(matrix)
    levelled = u.T @ found @ v.T
    off_diagonal = levelled - levelled.diag().diag()
    assert off_diagonal.abs().max() < 1e-4
    large = s > s.max() / 10  # three steps level the small ones in part
    assert ((levelled.diag()[large] > 0.4) & (levelled.diag()[large] < 1.3)).all()
    assert optim.orthogonalised(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_steps_on_the_small_square_matrix_are_newton_schulz_steps(shape):
    """Against the iteration as it was published, which moves the whole matrix at each step."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {dtype: optim.orthogonalised(x.to(dtype)) for dtype in (torch.float64, torch.float32)}
    with torch.autocast("cpu", torch.bfloat16):
        found[torch.bfloat16] = optim.orthogonalised(x.float())
    assert found[torch.bfloat16].dtype == torch.float32
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm()
    for _ in range(3):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        assert (found[dtype] - x).norm() < tolerance * x.norm()


def test_muon_is_its_definition():
    """Three steps against the update written out: filters by orthogonalised momentum, the rest by torch's SGD."""
    recipe = OptimizerRecipe(name="muon", learning_rate=0.2, momentum=0.8, muon_momentum=0.6, weight_decay=0.01)
    model, other = small_network(), small_network()
    ours = optim.make_optimizer(recipe, model)
    rest = [p for name, p in other.named_parameters() if p.dim() == 1 or name == "predictions.weight"]
    sgd = torch.optim.SGD(rest, lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.01)
    filters = {n: p for n, p in other.named_parameters() if p.dim() > 1 and n != "predictions.weight"}
    momenta = {name: torch.zeros_like(p) for name, p in filters.items()}
    x = torch.randn(9, 3, 16, 16)
    for _ in range(3):
        for net in (model, other):
            net.zero_grad()
            net(x).square().mean().backward()
        ours.step()
        sgd.step()
        with torch.no_grad():
            for name, weight in filters.items():
                momenta[name] = 0.6 * momenta[name] + weight.grad
                weight /= weight.norm() / math.sqrt(len(weight))
                update = optim.orthogonalised((weight.grad + 0.6 * momenta[name]).flatten(1))
                weight -= 0.2 * update.view_as(weight)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


def stepped(make, steps=6):
    """The weights, and what the optimizer keeps for each, after some steps of changing rates; once, one has no
    gradient."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64,), (32, 16, 3, 3), (100, 50))]
    weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
    optimizer = make(weights)
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        if step == 2:
            weights[0].grad = None
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (step + 1 + number)
        optimizer.step()
        optimizer.zero_grad()
    return weights, [{k: t for k, t in optimizer.state[w].items() if t is not None} for w in weights]


def groups(weights, first):
    return [{"params": weights[:1], **first}, {"params": weights[1:]}]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", (0.0, False), (0.9, False), (0.9, True)], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_bits_are_those_of_torchs_optimizers(kind, decay, grouped):
    if isinstance(kind, str):
        options = {"betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": decay}
        first = {"weight_decay": 0.3, "betas": (0.8, 0.9)}
        ours, theirs = (lambda w: optim.Adam(w, 1e-3, **options, decoupled=kind == "AdamW")), getattr(torch.optim, kind)
    else:
        options = {"momentum": kind[0], "nesterov": kind[1], "weight_decay": decay}
        first = {"weight_decay": 0.3}
        ours, theirs = (lambda w: optim.SGD(w, 1e-3, **options)), torch.optim.SGD
    split = (lambda weights: groups(weights, first)) if grouped else (lambda weights: [{"params": list(weights)}])
    weights, state = stepped(lambda w: ours(split(w)))
    expected_weights, expected_state = stepped(lambda w: theirs(split(w), lr=1e-3, fused=True, **options))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))
    for found, expected in zip(state, expected_state, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 512), (67, 31), (10,), (19, 7, 3, 3)])
@pytest.mark.parametrize("rule", [(0.0, False), (0.9, False), (0.9, True), "Adam", "AdamW", "quick Adam"], ids=str)
def test_a_gradient_of_either_type_moves_a_weight_as_torch_does(kind, rule, shape, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setenv("FROMZERO_KERNELS", "off")
    here = machine.prepare("bfloat16", device="cpu", threads=2)
    if compiled and here.kernels == kernels.NONE:
        pytest.skip("no kernels for bfloat16 on this machine")
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    if len(shape) == 4:
        weights = [torch.nn.Parameter(w.detach().contiguous(memory_format=torch.channels_last)) for w in weights]
    weights[1].data.copy_(weights[0].data)
    options = {"lr": 0.01, "weight_decay": 0.1}
    if isinstance(rule, str):
        options |= {"betas": (0.4, 0.9) if rule == "quick Adam" else (0.9, 0.999), "eps": 1e-7}
        ours = optim.Adam([{"params": weights[:1]}], **options, decoupled=rule == "AdamW")
        theirs = (torch.optim.AdamW if rule == "AdamW" else torch.optim.Adam)(weights[1:], fused=True, **options)
    else:
        options |= {"momentum": rule[0], "nesterov": rule[1]}
        ours = optim.SGD([{"params": weights[:1]}], **options)
        theirs = torch.optim.SGD(weights[1:], fused=True, **options)
    for _ in range(3):
        gradient = torch.randn(shape).to(kind)
        if len(shape) == 4:
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        weights[0].grad, weights[1].grad = gradient, gradient.float()
        with here.autocast():
            ours.step()
        theirs.step()
    assert torch.equal(*weights)
    found, expected = (optimizer.state[weight] for optimizer, weight in zip((ours, theirs), weights, strict=True))
    kept = [name for name, tensor in expected.items() if tensor is not None]
    assert len(kept) == (3 if isinstance(rule, str) else int(rule[0] != 0))
    for name in kept:
        assert torch.equal(found[name], expected[name])
