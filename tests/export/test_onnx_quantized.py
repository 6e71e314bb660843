"""Quantized matrices in the layout of MatMulNBits: exact, and read the same by ONNX Runtime."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from numprune.export.onnx_graph import DOMAIN
from numprune.export.onnx_quantized import Blocked, blocked
from numprune.quantization import Scheme, round_to_nearest

SCHEMES = [Scheme("w8a8"), Scheme("w4a16"), Scheme("w4a16", 32), Scheme("w4a16", 64), Scheme("w4a16", 128)]


def values_of(found: Blocked) -> Tensor:
    """The matrix (out, D) in float32, by ONNX's definition of the operator."""
    values = found.values
    if found.bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    raised = values.float() - 2 ** (found.bits - 1)
    return (raised * found.scales[..., None]).flatten(1)[:, : found.columns]


def product(inputs: Tensor, found: Blocked, accuracy_level: int) -> Tensor:
    """What ONNX Runtime gives."""
    node = helper.make_node(
        "MatMulNBits",
        ["x", "values", "scales"],
        ["y"],
        domain=DOMAIN,
        accuracy_level=accuracy_level,
        **found.attributes,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(inputs.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(getattr(found, name).numpy(), name) for name in ("values", "scales")],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString(), options
    )
    return torch.from_numpy(np.asarray(session.run(None, {"x": inputs.numpy()})[0]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("columns", [128, 200, 384])
def test_the_values_are_those_of_the_matrix(scheme: Scheme, columns: int) -> None:
    columns -= columns % (scheme.group_size or 1)
    generator = torch.Generator().manual_seed(columns)
    matrix = round_to_nearest(torch.randn(48, columns, generator=generator), scheme)
    found = blocked(matrix)
    assert torch.equal(values_of(found), matrix.dequantized())
    inputs = torch.randn(3, columns, generator=generator)
    expected = inputs @ matrix.dequantized().T
    torch.testing.assert_close(product(inputs, found, accuracy_level=1), expected, atol=1e-4, rtol=1e-4)
    # 8-bit inputs err by half a step, a 254th of a block's range, at most; on average far less.
    rounded = product(inputs, found, accuracy_level=4)
    assert 0 < float((rounded - expected).norm() / expected.norm()) < 0.01
