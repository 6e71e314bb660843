"""Builder of an ONNX graph: nodes are numbered as they come, large weights are streamed to one external data file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from numprune.export.precision import cast

DATA_FILE = "model.onnx.data"
DOMAIN = "com.microsoft"  # of the operators that only ONNX Runtime has

INLINE_BYTES = 1024  # smaller tensors stay in the graph: shape arithmetic must be readable without the data file
PAGE_BYTES = 4096  # aligned, so that a runtime can map each weight into memory instead of copying it


ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
}


@dataclass
class Graph:
    """Collects nodes, initializers, inputs and outputs; `op` and other methods return the name of the added value."""

    data: BinaryIO  # the external data file, open for writing
    dtype: torch.dtype = torch.float32  # of weights and hidden states, one of `ELEMENTS`
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output."""
        return self.split(kind, *inputs, outputs=1, **attributes)[0]

    def split(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs."""
        name = f"{kind}_{len(self.nodes)}"
        names = [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def fused(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a node of ONNX Runtime's own domain with several outputs; an input "" is left out."""
        return self.split(kind, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def integers(self, *values: int) -> str:
        """A constant int64 vector."""
        return self._constant("i" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """A constant int64 scalar."""
        return self._constant(f"i{value}_scalar", np.array(value, dtype=np.int64))

    @property
    def element(self) -> int:
        """ONNX's number of `dtype`."""
        return ELEMENTS[self.dtype]

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> str:
        """A constant scalar."""
        return self.weight(f"f{value!r}" if dtype == torch.float32 else f"h{value!r}", torch.tensor(value), dtype)

    def float32(self, value: str) -> str:
        """Cast `value` from the graph's `dtype` to float32, in which norms and softmax are computed."""
        return value if self.dtype == torch.float32 else self.op("Cast", value, to=TensorProto.FLOAT)

    def rounded(self, value: str) -> str:
        """Cast `value` from float32 to the graph's `dtype`."""
        return value if self.dtype == torch.float32 else self.op("Cast", value, to=self.element)

    def weight(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
        """Add an initializer in `dtype`, by default the graph's. A second call with the same name refers to the first.

        Raises IntegrityError if a value is too large for `dtype`.
        """
        if name in self.initializers:
            return name
        dtype = dtype or self.dtype
        content = cast(name, tensor.detach(), dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        proto = TensorProto(name=name, data_type=ELEMENTS[dtype], dims=tensor.shape)
        self.initializers[name] = proto
        if content.nbytes <= INLINE_BYTES:
            proto.raw_data = content.tobytes()
            return name
        self.data.write(b"\0" * (-self.data.tell() % PAGE_BYTES))
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": DATA_FILE, "offset": self.data.tell(), "length": content.nbytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.data.write(content.data)  # `tofile` does not say why it failed
        return name

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, kind: int, shape: list[int | str]) -> None:
        """Make `value` an output of the graph under the given name."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output.{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self, opset: int, metadata: dict[str, str]) -> onnx.ModelProto:
        domains = {"": opset} | ({DOMAIN: 1} if any(node.domain == DOMAIN for node in self.nodes) else {})
        graph = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, initializer=list(self.initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
            producer_name="numprune",
            ir_version=10,
        )
        helper.set_model_props(model, metadata)
        return model

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph beside its data file, and check it."""
    path.write_bytes(model.SerializeToString())
    check(path)


def check(path: Path) -> None:
    """Check a graph file of any size, with shape and type inference. Raises onnx.checker.ValidationError."""
    onnx.checker.check_model(str(path), full_check=True)
