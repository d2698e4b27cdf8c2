"""Our optimizer objects give the bits of torch's, and do not import its compiler."""

import subprocess
import sys

import pytest
import torch

from fromzero import fused, kernels, machine


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
        ours, theirs = (lambda w: fused.Adam(w, 1e-3, **options, decoupled=kind == "AdamW")), getattr(torch.optim, kind)
    else:
        options = {"momentum": kind[0], "nesterov": kind[1], "weight_decay": decay}
        first = {"weight_decay": 0.3}
        ours, theirs = (lambda w: fused.SGD(w, 1e-3, **options)), torch.optim.SGD
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
        ours = fused.Adam([{"params": weights[:1]}], **options, decoupled=rule == "AdamW")
        theirs = (torch.optim.AdamW if rule == "AdamW" else torch.optim.Adam)(weights[1:], fused=True, **options)
    else:
        options |= {"momentum": rule[0], "nesterov": rule[1]}
        ours = fused.SGD([{"params": weights[:1]}], **options)
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


def test_a_training_imports_nothing_that_it_does_not_need(tmp_path, write_cifar):
    """Up to the first step: no compiler of torch, no drawing, no downloading, no data set of another package."""
    folder = write_cifar(tmp_path / "set")
    program = (
        "import sys\n"
        "from fromzero import cli, display\n"
        "def watch(training, console, after_epoch):\n"
        "    steps = iter(training)\n"
        "    next(steps)\n"
        "    next(steps)\n"
        "    print('imported', *sorted(sys.modules), file=sys.stderr)\n"
        "    raise SystemExit\n"
        "display.watch = watch\n"
        f"cli.main(['train', {str(folder)!r}, '--recipe', 'train1', '--batch_size', '50', '--threads', '1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    imported = done.stderr.rpartition("imported ")[2].split()
    assert "torch" in imported, done.stderr
    unneeded = {"torch._dynamo", "sympy", "matplotlib", "sklearn", "scipy", "pooch", "requests"} & set(imported)
    assert not unneeded
