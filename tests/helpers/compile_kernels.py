"""Compiles the fused kernels for an H100 at paper size, without one and without TRITON_INTERPRET.

Prints a line for every kernel: its name, and the bytes of its machine code.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from rest_lightning.models import fused

HOPPER = GPUTarget("cuda", 90, 32)
# The width of the paper's transformer, its feed-forward layer, and a stage of LTX's decoder.
SIZES: dict[Any, list[dict[str, Any]]] = {
    fused._norm_modulate_kernel: [
        {"ADD": add, "GATE": add, "MODULATE": True, "QUANTISE": low, "BLOCK": 2048}
        for add in (False, True)
        for low in (False, True)
    ],
    fused._rotate_store_kernel: [{"BLOCK": 2048}],
    fused._few_keys_kernel: [{"HEADS": 32, "HEAD_DIM": 64, "KEYS": keys} for keys in (1, 2, 8)],
    fused._gelu_quantise_kernel: [{"BLOCK": 8192}],
    fused._norm_silu_kernel: [{"MODULATE": True, "PLACES": 16, "BLOCK": 128}],
}
FLOAT32 = ("table_ptr", "factor_ptr")
FLOATS = ("eps", "temperature")


def kind(name: str, sizes: dict[str, Any]) -> str:
    """Triton's name of an argument's type."""
    if name in sizes:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "fp32" if name in FLOATS else "i32"
    if name == "out_ptr" and sizes.get("QUANTISE", "MODULATE" not in sizes and "KEYS" not in sizes):
        return "*fp8e4nv"
    return "*fp32" if name in FLOAT32 else "*bf16"


def main() -> None:
    """Compile everything."""
    for kernel, variants in SIZES.items():
        for sizes in variants:
            signature = {name: kind(name, sizes) for name in kernel.arg_names}
            places = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=places)
            compiled = compile(source, target=HOPPER, options={"num_warps": 8})
            print(kernel.__name__, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
