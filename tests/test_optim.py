"""Optimizers: groups, rates, and Muon against its definition."""

import math

import pytest
import torch

from fromzero import networks, optim
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
