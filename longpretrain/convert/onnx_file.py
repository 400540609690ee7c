"""An ONNX file made by hand: nodes in the order they are named, and the same bytes each time.

The only file that imports onnx.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import longpretrain
from longpretrain.mapped import release

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
LARGEST_FILE_BYTES = 1_900_000_000
"""Of weights inside model.onnx: a file of protobuf ends at 2 GiB."""
OPSET = 17
"""The first with LayerNormalization: of 2022, so that old runtimes read it."""
_IR_VERSION = 8
_ALIGNMENT = 4096
"""Bytes; runtimes map a tensor only where a page begins."""
STORED = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}
"""Types that weights may lie in, and what ONNX calls them."""


def why_no_onnx() -> str | None:
    """Why no ONNX file can be made and checked; None if it can."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    return None


class OnnxGraph:
    """A graph that grows node by node; a value is known by its name.

    Args:
        weights: tensors that it may use, by name, of any floating-point type.
        stored: how they lie in the file, float32 or float16. All arithmetic is in float32.
    """

    def __init__(self, weights: Mapping[str, Tensor], stored: torch.dtype = torch.float32) -> None:
        self._weights, self._stored = weights, stored
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], tuple[float, ...]], Any] = {}
        self._used: dict[str, str] = {}  # name of a weight -> value to compute with
        self._scope = ""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside have names that begin with ``name``."""
        before = self._scope
        self._scope = f"{before}{name}/"
        try:
            yield
        finally:
            self._scope = before

    def input(self, name: str, dims: Sequence[str]) -> str:
        """An input of whole numbers (int64) with named, hence free, dimensions."""
        self._inputs.append(_value(name, "INT64", dims))
        return name

    def output(self, name: str, value: str, dims: Sequence[str | int]) -> None:
        """Gives a value of real numbers out, under a name of its own."""
        self._node("Identity", [value], name, {})
        self._outputs.append(_value(name, "FLOAT", dims))

    def node(self, operator: str, *values: str, **attributes: Any) -> str:
        """An operator's result."""
        return self._node(operator, list(values), self._new(operator), attributes)

    def nodes(self, operator: str, *values: str, outputs: int, **attributes: Any) -> list[str]:
        """As ``node``, of an operator with several results."""
        names = [self._new(f"{operator}{number}") for number in range(outputs)]
        return self._many(operator, list(values), names, attributes)

    def ints(self, *numbers: int) -> str:
        """Whole numbers, as a vector."""
        return self._constant("INT64", (len(numbers),), numbers)

    def whole(self, number: int) -> str:
        """A whole number without dimensions."""
        return self._constant("INT64", (), (number,))

    def real(self, number: float) -> str:
        """A real number without dimensions."""
        return self._constant("FLOAT", (), (number,))

    def weight(self, name: str) -> str:
        """A weight as it is stored; the second time it is the same one."""
        self._used.setdefault(name, "")
        return name

    def real_weight(self, name: str) -> str:
        """A weight to compute with."""
        self._used[name] = self._used.get(name) or self.as_real(name)
        return self._used[name]

    def as_real(self, value: str) -> str:
        """A stored value in float32."""
        return value if self._stored == torch.float32 else self.cast(value, "FLOAT")

    def cast(self, value: str, kind: str) -> str:
        """A value in another type: FLOAT, INT64 or BOOL."""
        from onnx import TensorProto

        return self.node("Cast", value, to=getattr(TensorProto, kind))

    def save(self, folder: Path, *, largest_file_bytes: int = LARGEST_FILE_BYTES) -> None:
        """Writes model.onnx, with weights of more than so many bytes in model.onnx.data beside."""
        from onnx import helper

        size = sum(self._weights[name].numel() * self._stored.itemsize for name in self._used)
        if size > largest_file_bytes:
            with (folder / DATA_NAME).open("wb") as file:
                weights = [self._outside(name, file) for name in self._used]
        else:
            weights = [self._inside(name) for name in self._used]
        graph = helper.make_graph(
            self._nodes, "longpretrain", self._inputs, self._outputs,
            initializer=[*self._constants.values(), *weights],
        )  # fmt: skip
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION,
            producer_name="longpretrain", producer_version=longpretrain.__version__,
        )  # fmt: skip
        (folder / MODEL_NAME).write_bytes(model.SerializeToString(deterministic=True))

    def _inside(self, name: str) -> Any:
        proto, tensor = self._header(name), self._weights[name]
        proto.raw_data = _numbers(tensor, self._stored).tobytes()
        release(tensor)
        return proto

    def _outside(self, name: str, file: BinaryIO) -> Any:
        from onnx import TensorProto

        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
        offset, tensor = file.tell(), self._weights[name]
        file.write(_numbers(tensor, self._stored))
        release(tensor)
        proto = self._header(name)
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": DATA_NAME, "offset": offset, "length": file.tell() - offset}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        return proto

    def _header(self, name: str) -> Any:
        from onnx import TensorProto

        kind = getattr(TensorProto, STORED[self._stored])
        return TensorProto(name=name, data_type=kind, dims=tuple(self._weights[name].shape))

    def _constant(self, kind: str, dims: tuple[int, ...], numbers: Sequence[float]) -> str:
        from onnx import TensorProto, helper

        key = (kind, dims, tuple(numbers))
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = helper.make_tensor(
                name, getattr(TensorProto, kind), dims, numbers
            )
        return str(self._constants[key].name)

    def _new(self, operator: str) -> str:
        return f"{self._scope}{len(self._nodes)}_{operator}"

    def _node(
        self, operator: str, values: list[str], output: str, attributes: dict[str, Any]
    ) -> str:
        return self._many(operator, values, [output], attributes)[0]

    def _many(
        self, operator: str, values: list[str], outputs: list[str], attributes: dict[str, Any]
    ) -> list[str]:
        from onnx import helper

        name = f"{self._scope}{len(self._nodes)}_{operator}"
        self._nodes.append(helper.make_node(operator, values, outputs, name=name, **attributes))
        return outputs


def check_file(path: Path) -> None:
    """The own checker of onnx, shapes included.

    Raises:
        RuntimeError: the file is no ONNX model by the rules of onnx.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RuntimeError(f"onnx.checker: {error}") from error


def _value(name: str, kind: str, dims: Sequence[str | int]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), list(dims))


def _numbers(tensor: Tensor, stored: torch.dtype) -> memoryview:
    """In rows; little-endian, as ONNX wants it and as every machine has it that torch runs on."""
    return tensor.detach().to(device="cpu", dtype=stored).contiguous().numpy().data
