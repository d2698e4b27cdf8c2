"""A run's weights for other people's programs: an ONNX model.

The graph is made from the same rows of `networks.layers` that the network is built from, in float32, with what precedes
and follows the network in it: pixels as bytes go in, probabilities come out. Needs the package onnx, an extra.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fromzero import networks
from fromzero.data.decoding import preparation
from fromzero.errors import FromzeroError, InputError
from fromzero.runs import check_named, write_named
from fromzero.trained import Classifier

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and what runtimes of that time read
CHECKED_IMAGES = 8
TOLERANCE, SHARE = 1e-2, 1e-3  # of the logarithm of a probability, nats; of the largest, where float32 rounds by more


def export(classifier: Classifier, path: Path, documentation: str = "") -> float:
    """Write a run's network to `path` as ONNX, from pixels uint8 (N, H, W, C) to probabilities float32
    (N, classes); its metadata hold the names of the classes and how pictures become pixels, and the model is documented
    so, in Markdown.

    Returns the largest difference in nats between the logarithms of its probabilities and of `classifier`'s on random
    images, as onnx's reference implementation computes them, from what goes into the softmax: behind it a network that
    is sure of everything has ones and zeros, which say nothing. Raises InputError without the package onnx,
    FromzeroError where the two differ by more than TOLERANCE or SHARE (nothing is written then) or where the file
    cannot be written."""
    try:
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        raise InputError("export needs the package onnx: pip install onnx") from None
    check_named(path, ".onnx")
    model = _model(classifier)
    model.doc_string = _text(documentation)
    pixels = np.random.default_rng(0).integers(0, 256, (CHECKED_IMAGES, *classifier.image_shape), dtype=np.uint8)
    (theirs,) = ReferenceEvaluator(_up_to_softmax(model)).run(None, {"pixels": pixels})
    own = classifier.outputs(torch.from_numpy(pixels).to(classifier.machine.device)).cpu() / classifier.temperature
    ours, as_onnx = (outputs.double().log_softmax(1) for outputs in (own, torch.from_numpy(theirs)))
    difference = float((as_onnx - ours).abs().max())
    if not difference <= max(TOLERANCE, SHARE * float(ours.abs().max())):
        raise FromzeroError(
            f"{classifier.run.path}: its log-probabilities as ONNX would be off by {difference:.2g}; nothing was"
            " written"
        )
    write_named(path, model.SerializeToString(), ".onnx")
    return difference


def _up_to_softmax(model: Any) -> Any:
    """The same model with what goes into its softmax for its output."""
    import onnx
    from onnx import TensorProto, helper

    part = onnx.ModelProto()
    part.CopyFrom(model)
    softmax = part.graph.node.pop()
    part.graph.output[0].CopyFrom(helper.make_tensor_value_info(softmax.input[0], TensorProto.FLOAT, None))
    return part


def _model(classifier: Classifier) -> Any:
    """The ONNX model."""
    import onnx
    from onnx import TensorProto, helper

    run, shape = classifier.run, classifier.image_shape
    recipe = run.recipe
    graph = _Graph({name: tensor.float().cpu().numpy() for name, tensor in classifier.network.state_dict().items()})
    x = graph.add("Cast", "pixels", to=TensorProto.FLOAT)
    x = graph.add("Sub", x, graph.constant("shift", classifier.normalise.shift.cpu().numpy()))
    x = graph.add("Mul", x, graph.constant("scale", classifier.normalise.scale.cpu().numpy()))
    x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    branch, skipped = 0, ""
    for row in networks.layers(recipe.network, shape, len(classifier.class_names)):
        if row.branch not in (0, branch):
            branch, skipped = row.branch, x
        x = graph.add_layer(row, x, skipped, recipe.network.activation)
    x = graph.add("Div", x, graph.constant("temperature", np.array(classifier.temperature, np.float32)))
    graph.add("Softmax", x, axis=1, output="probabilities")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", *shape])
    out = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(classifier.class_names)])
    made = helper.make_graph(graph.nodes, "fromzero", [pixels], [out], graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="fromzero")
    model.ir_version = IR_VERSION
    described = {
        "classes": json.dumps(classifier.class_names),
        "run": _text(run.name),
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint(),
        "weights": f"{classifier.checkpoint.file.stem}, after epoch {classifier.checkpoint.epochs} of {recipe.epochs}",
    }
    if shape[2] == 3:
        described["pixels"] = preparation(*shape[:2])
    helper.set_model_props(model, described)
    onnx.checker.check_model(model, full_check=True)
    return model


def _text(words: str) -> str:
    """The same as text: names of files may be none, and a model has no other."""
    return words.encode(errors="replace").decode()


class _Graph:
    """Nodes and constants as they are added; weights by the name of their layer."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        # A layer of a residual block is called residual_1.conv2d_2, and no other layer is called conv2d_2.
        self.weights = {".".join(name.split(".")[-2:]): array for name, array in weights.items()}

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node; the name of its output."""
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, layer: str, which: str) -> str:
        return self.constant(f"{layer}.{which}", self.weights[f"{layer}.{which}"])

    def add_layer(self, row: networks.Layer, x: str, skipped: str, activation: str) -> str:
        """What a row computes, as in evaluation. `skipped`: what its residual block was given."""
        match row.kind:
            case "Conv2D":
                same = row.padding == "same"
                before, after = ((row.kernel - 1) // 2, row.kernel // 2) if same else (0, 0)
                bias = [self.weight(row.name, "bias")] if f"{row.name}.bias" in self.weights else []
                return self.add("Conv", x, self.weight(row.name, "weight"), *bias, pads=[before, before, after, after])
            case "BatchNormalization":
                mean, variance = (self.weight(row.name, f"running_{which}") for which in ("mean", "var"))
                ones = self.constant(f"{row.name}.scale", np.ones(row.shape[-1], np.float32))
                return self.add(
                    "BatchNormalization", x, ones, self.weight(row.name, "bias"), mean, variance, epsilon=1e-5
                )
            case "MaxPooling2D":
                return self.add("MaxPool", x, kernel_shape=[row.pool] * 2, strides=[row.pool] * 2)
            case "GlobalMaxPooling2D" | "GlobalAveragePooling2D":
                kind = "GlobalMaxPool" if row.kind == "GlobalMaxPooling2D" else "GlobalAveragePool"
                return self.add("Flatten", self.add(kind, x))
            case "Flatten":
                return self.add("Flatten", self.add("Transpose", x, perm=[0, 2, 3, 1]))
            case "Dense":
                return self.add("Gemm", x, self.weight(row.name, "weight"), self.weight(row.name, "bias"), transB=1)
            case "Activation":
                return self.add({"relu": "Relu", "gelu": "Gelu"}[activation], x)
            case "Add":
                return self.add("Add", x, skipped)
            case "Rescaling":
                return self.add("Mul", x, self.constant(row.name, np.array(row.rate, np.float32)))
            case "Dropout":
                return x
        raise AssertionError(row.kind)
