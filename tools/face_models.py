"""Convert MediaPipe's face networks to `rest_lightning/assets/faces/face_models.safetensors`.

    pip install mediapipe==0.10.14 tflite        # Python 3.12 or older; nothing else needs them
    python tools/face_models.py

Reads the two .tflite files out of the installed wheel of mediapipe, checks their SHA-256, and
writes the weights in the order in which the torch modules of `rest_lightning.media.face_models` use
them. The weights stay float16, as they are in the source: nothing is lost. The file is written
under another name first and renamed when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import tflite
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from rest_lightning.media.face_models import WEIGHTS, DetectorNet, MeshNet

VERSION = "0.10.14"
SOURCES = {
    "detector": (
        "modules/face_detection/face_detection_full_range_sparse.tflite",
        "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
    ),
    "mesh": (
        "modules/face_landmark/face_landmark.tflite",
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    ),
}
LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "PRELU")
PASSED_THROUGH = ("DEQUANTIZE", "DENSIFY")
Layer = tuple[str, list[NDArray[np.float32]]]


class Graph:
    """One .tflite file: its layers with weights, in the order in which its outputs need them."""

    def __init__(self, content: bytes) -> None:
        self.model = tflite.Model.GetRootAsModel(content, 0)
        self.graph = self.model.Subgraphs(0)
        self.makers: dict[int, Any] = {}
        for i in range(self.graph.OperatorsLength()):
            operator = self.graph.Operators(i)
            for tensor in operator.OutputsAsNumpy():
                self.makers[int(tensor)] = operator

    def kind(self, operator: Any) -> str:
        """Returns the name of an operator's kind."""
        code = self.model.OperatorCodes(operator.OpcodeIndex())
        return str(tflite.opcode2name(max(code.BuiltinCode(), code.DeprecatedBuiltinCode())))

    def layers(self) -> list[Layer]:
        """Kind and arrays (kernel and bias, or slopes) of every layer, from the input to output 0,
        1, ...
        """
        found: list[Layer] = []
        seen: set[int] = set()

        def visit(tensor: int) -> None:
            operator = self.makers.get(tensor)
            if operator is None or tensor in seen:
                return
            seen.add(tensor)
            inputs = [int(i) for i in operator.InputsAsNumpy()]
            for i in inputs:
                visit(i)
            if self.kind(operator) in LAYERS:
                found.append((self.kind(operator), [self.constant(i) for i in inputs[1:]]))

        for output in self.graph.OutputsAsNumpy():
            visit(int(output))
        return found

    def constant(self, index: int) -> NDArray[np.float32]:
        """The values of a tensor, through the operators that widen and densify it."""
        operator = self.makers.get(index)
        if operator is not None:
            if self.kind(operator) not in PASSED_THROUGH:
                raise SystemExit(
                    f"expected constant weights, got the result of {self.kind(operator)}"
                )
            return self.constant(int(operator.InputsAsNumpy()[0]))
        tensor = self.graph.Tensors(index)
        kinds = {tflite.TensorType.FLOAT16: np.float16, tflite.TensorType.FLOAT32: np.float32}
        values = self.model.Buffers(tensor.Buffer()).DataAsNumpy().view(kinds[tensor.Type()])
        if tensor.Sparsity() is not None:
            values = dense(values, tensor)
        return values.reshape(tensor.ShapeAsNumpy()).astype(np.float32)


def dense(values: NDArray[Any], tensor: Any) -> NDArray[Any]:
    """All values of a tensor whose last dimension is compressed: the only form that these files
    have.
    """
    sparsity = tensor.Sparsity()
    last = sparsity.DimMetadata(sparsity.DimMetadataLength() - 1)
    order = list(sparsity.TraversalOrderAsNumpy())
    formats = [sparsity.DimMetadata(i).Format() for i in range(len(order))]
    if (
        sparsity.BlockMapLength()
        or order != sorted(order)
        or sum(formats) != 1
        or not last.Format()
    ):
        raise SystemExit("expected weights whose last dimension alone is sparse, got another form")
    segments = vector(last.ArraySegments(), last.ArraySegmentsType())
    columns = vector(last.ArrayIndices(), last.ArrayIndicesType())
    shape = [int(n) for n in tensor.ShapeAsNumpy()]
    filled = np.zeros((int(np.prod(shape[:-1])), shape[-1]), values.dtype)
    rows = np.repeat(np.arange(len(filled)), np.diff(segments))
    filled[rows, columns] = values
    return filled


def vector(table: Any, kind: int) -> NDArray[np.int64]:
    """The integers of one of the file format's three kinds of index vectors."""
    classes = {
        tflite.SparseIndexVector.Int32Vector: tflite.Int32Vector,
        tflite.SparseIndexVector.Uint16Vector: tflite.Uint16Vector,
        tflite.SparseIndexVector.Uint8Vector: tflite.Uint8Vector,
    }
    typed = classes[kind]()
    typed.Init(table.Bytes, table.Pos)
    integers: NDArray[np.int64] = typed.ValuesAsNumpy().astype(np.int64)
    return integers


def weights_of(layers: list[Layer], model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    """The file's layers under the names of the modules that use them, matched by the order of use.

    Args:
        layers: as `Graph.layers` gives them.
        model: the torch module.
        picture: any input of the right shape.
    """
    used: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.PReLU):
            module.register_forward_pre_hook(lambda m, _, n=name: used.append((n, m)))
    model(picture)
    if len(used) != len(layers):
        raise SystemExit(f"expected {len(used)} layers, got {len(layers)} in the file")
    state = {}
    for (name, module), (kind, arrays) in zip(used, layers, strict=True):
        values = [torch.from_numpy(array) for array in arrays]
        if kind == "PRELU":
            tensors = {"weight": values[0].flatten()}
        else:  # kernels: output, row, column, input; of depthwise ones: 1, row, column, channel
            axes = (3, 0, 1, 2) if kind == "DEPTHWISE_CONV_2D" else (0, 3, 1, 2)
            tensors = {"weight": values[0].permute(axes), "bias": values[1]}
        for key, tensor in tensors.items():
            expected = getattr(module, key).shape
            if tensor.shape != expected:
                raise SystemExit(
                    f"expected {tuple(expected)} for {name}.{key}, got {tuple(tensor.shape)}"
                )
            state[f"{name}.{key}"] = tensor.half().contiguous()
            if not torch.equal(state[f"{name}.{key}"].float(), tensor):
                raise SystemExit(
                    f"expected float16 values for {name}.{key}: rounding them would lose some"
                )
    return state


def convert(mediapipe: Path, out: Path) -> None:
    """Write both networks of the package in the folder ``mediapipe`` to the file ``out``."""
    models = {"detector": DetectorNet(), "mesh": MeshNet()}
    picture = torch.zeros(1, 3, 192, 192)
    state: dict[str, Tensor] = {}
    source: dict[str, Any] = {"package": f"mediapipe {VERSION}", "licence": "Apache-2.0"}
    for part, (name, expected) in SOURCES.items():
        content = (mediapipe / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != expected:
            raise SystemExit(
                f"expected SHA-256 {expected} of {name}, got {sha256}: install mediapipe=={VERSION}"
            )
        source[part] = {"file": name, "sha256": sha256}
        for key, tensor in weights_of(Graph(content).layers(), models[part], picture).items():
            state[f"{part}.{key}"] = tensor
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".part")
    # One key: safetensors writes several in an order that differs from run to run.
    save_file(state, unfinished, {"source": json.dumps(source)})
    unfinished.replace(out)
    print(f"{out}: {len(state)} tensors, {out.stat().st_size / 1e6:.2f} MB")


def source_folder(given: Path | None) -> Path:
    """The folder of the package mediapipe, which is not imported: that takes seconds."""
    if given is not None:
        return given
    found = importlib.util.find_spec("mediapipe")
    if found is None or found.origin is None:
        raise SystemExit(f"expected mediapipe {VERSION}: pip install mediapipe=={VERSION} tflite")
    return Path(found.origin).parent


def main() -> None:
    """Converts and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--mediapipe", type=Path, help="folder of the package (default: the installed one)"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the file to write")
    args = parser.parse_args()
    convert(source_folder(args.mediapipe), args.out)


if __name__ == "__main__":
    main()
