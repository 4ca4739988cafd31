"""The ONNX graph of a model: an `If` per modality around its encoder, then fusion; every table is stored once.

    video, has_video -> If(has_video): encoder else zeros -> tokens --+
    audio, has_audio -> If(has_audio): encoder else zeros -> tokens --+-> fusion -> logits of each head

Encoders and fusion are traced one by one and put together here. PyTorch's exporter stores index tables as int64, keeps
constants such as a tensor of zeros whole, and repeats what several graphs hold; `compact` and `share` undo that without
changing a number. All of it is computed back when the file is loaded, not per clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.compose import add_prefix_graph
from onnx_ir.passes.common import InlinePass
from onnxscript.optimizer import fold_constants, remove_unused_nodes

from karmma_dist.deploy.model_file import ModelHeader, ModelInput

OPSET, IR_VERSION = 20, 10
_LARGE = 1024
"""Values of a constant from which on its size in the file counts."""


def simplified(model: onnx_ir.Model) -> ModelProto:
    """Return a traced model without functions and with everything computed that no input changes."""
    InlinePass()(model)
    fold_constants(model)
    remove_unused_nodes(model)
    proto: ModelProto = onnx_ir.serde.serialize_model(model)
    return proto


def assemble(
    encoders: Mapping[str, GraphProto],
    token_shapes: Mapping[str, Sequence[int]],
    fusion: GraphProto,
    inputs: Sequence[ModelInput],
    heads: Mapping[str, int],
    *,
    halves: bool,
) -> ModelProto:
    """Put traced graphs together to a model.

    Args:
        encoders: Graph of each modality, from its array to its tokens.
        token_shapes: Shape of those tokens.
        fusion: Graph from the tokens and the flags of all modalities, in the order of `inputs`, to the logits.
        inputs: Arrays that the model takes.
        heads: Number of classes by head, in the order of the outputs of `fusion`.
        halves: True to store weights as float16; they are computed with as float32.
    """
    outputs = [ModelHeader.output(head) for head in heads]
    fusion = _prefixed(fusion, "fusion", [*map(_tokens, inputs), *(each.flag for each in inputs)], outputs)
    parts = {
        each.name: _prefixed(encoders[each.modality], each.name, [each.name], [f"{each.name}/tokens"])
        for each in inputs
    }
    for graph in (fusion, *parts.values()):
        compact(graph, halves=halves)
    shared = share([fusion, *parts.values()])
    nodes = [_if_present(each, parts[each.name], token_shapes[each.modality]) for each in inputs]
    graph = helper.make_graph(
        [*nodes, *fusion.node],
        "karmma",
        [value for each in inputs for value in _values(each)],
        [helper.make_tensor_value_info(ModelHeader.output(head), TensorProto.FLOAT, [n]) for head, n in heads.items()],
        [*shared, *fusion.initializer],
    )
    return helper.make_model(
        graph, producer_name="karmma-dist", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )


def _tokens(given: ModelInput) -> str:
    return f"{given.name}/tokens_or_zeros"


def _values(given: ModelInput) -> list[onnx.ValueInfoProto]:
    array_type = helper.np_dtype_to_tensor_dtype(np.dtype(given.dtype))
    return [
        helper.make_tensor_value_info(given.name, array_type, given.shape),
        helper.make_tensor_value_info(given.flag, TensorProto.BOOL, []),
    ]


def _if_present(given: ModelInput, encoder: GraphProto, token_shape: Sequence[int]) -> NodeProto:
    """Return the node that computes a modality's tokens, or zeros without it."""
    absent = f"{given.name}/no_tokens"
    shape = helper.make_node(
        "Constant", [], [f"{absent}_shape"], value=numpy_helper.from_array(np.array(token_shape, np.int64))
    )
    zeros = helper.make_node("ConstantOfShape", [f"{absent}_shape"], [absent])
    info = helper.make_tensor_value_info(absent, TensorProto.FLOAT, token_shape)
    del encoder.input[:]  # a branch sees the values around it
    return helper.make_node(
        "If", [given.flag], [_tokens(given)], name=f"{given.name}/if_present",
        then_branch=encoder, else_branch=helper.make_graph([shape, zeros], f"{given.name}/absent", [], [info]),
    )  # fmt: skip


def _prefixed(graph: GraphProto, prefix: str, inputs: Sequence[str], outputs: Sequence[str]) -> GraphProto:
    """Return a graph whose names begin with `prefix/`, except its inputs and outputs, which get the names given."""
    names = dict(zip((value.name for value in graph.input), inputs, strict=True))
    names |= dict(zip((value.name for value in graph.output), outputs, strict=True))
    renamed = add_prefix_graph(graph, f"{prefix}/")
    _rename(renamed, {f"{prefix}/{name}": new for name, new in names.items()})
    renamed.name = prefix
    return renamed


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values wherever a graph, or one inside of it, uses them."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
        for inner in _graphs(node):
            _rename(inner, names)


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def compact(graph: GraphProto, *, halves: bool) -> None:
    """Store large constants of a graph in fewer bytes, in place, and remove what tells where it was traced.

    Equal values become one value, int64 becomes int16 or int32 where the values fit, and with `halves` float32 becomes
    float16 where they fit.
    """
    _lift(graph)
    computing = []
    for place in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[place]
        if _num_values(tensor) < _LARGE or (smaller := _smaller(tensor, halves)) is None:
            continue
        stored, operator, attributes = smaller
        stored.name = f"{tensor.name}/stored"
        computing.append(helper.make_node(operator, [stored.name], [tensor.name], **attributes))
        tensor.CopyFrom(stored)
    _set_nodes(graph, [*computing, *graph.node])
    _forget(graph)


def _lift(graph: GraphProto) -> None:
    """Turn nodes that hold a large constant into initial values, in place."""
    kept = []
    for node in graph.node:
        held = node.attribute[0].t if node.op_type == "Constant" else None
        if held is None or _num_values(held) < _LARGE:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(held)
        tensor.name = node.output[0]
    _set_nodes(graph, kept)


def _set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Replace a graph's nodes by others, of which some may be its own."""
    copies = GraphProto()
    copies.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(copies.node)


def _num_values(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _smaller(tensor: TensorProto, halves: bool) -> tuple[TensorProto, str, dict[str, Any]] | None:
    """Return a smaller constant, and the operator and its attributes that compute a large one from it; or None."""
    array = numpy_helper.to_array(tensor)
    first = array.flat[0]
    if array.tobytes() == np.full_like(array, first).tobytes():
        value = numpy_helper.from_array(np.array([first], array.dtype))
        return numpy_helper.from_array(np.array(array.shape, np.int64)), "ConstantOfShape", {"value": value}
    kinds: tuple[type, ...] = ()
    if array.dtype == np.int64:
        kinds = (np.int16, np.int32)
    elif halves and array.dtype == np.float32 and np.abs(array).max() <= np.finfo(np.float16).max:
        kinds = (np.float16,)
    for kind in kinds:
        smaller: np.ndarray = array.astype(kind)
        if array.dtype != np.int64 or np.array_equal(array, smaller):
            return numpy_helper.from_array(smaller), "Cast", {"to": tensor.data_type}
    return None


def _forget(graph: GraphProto) -> None:
    """Remove descriptions: they hold paths of the machine that traced the graph."""
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for inner in _graphs(node):
            _forget(inner)


def share(graphs: Sequence[GraphProto]) -> list[TensorProto]:
    """Take large constants that occur several times out of the graphs, in place; return them under names of their own.

    A graph inside of another one sees its values.
    """
    places: dict[bytes, list[tuple[GraphProto, str]]] = {}
    for graph in graphs:
        for tensor in graph.initializer:
            if _num_values(tensor) >= _LARGE:
                places.setdefault(_content(tensor), []).append((graph, tensor.name))
    repeated = [found for found in places.values() if len(found) > 1]
    shared: list[TensorProto] = []
    for number, found in enumerate(repeated):
        taken = [_taken(graph, name) for graph, name in found]
        for graph, name in found:
            _rename(graph, {name: f"shared/{number}"})
        taken[0].name = f"shared/{number}"
        shared.append(taken[0])
    return shared


def _taken(graph: GraphProto, name: str) -> TensorProto:
    """Remove an initial value from a graph and return it."""
    place = next(place for place, tensor in enumerate(graph.initializer) if tensor.name == name)
    tensor = TensorProto()
    tensor.CopyFrom(graph.initializer[place])
    del graph.initializer[place]
    return tensor


def _content(tensor: TensorProto) -> bytes:
    array = numpy_helper.to_array(tensor)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).digest()
