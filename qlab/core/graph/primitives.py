"""MLX's primitives by how they treat memory, under the names that an exported graph has.

Read in MLX 0.32: ``mlx/backend/common`` (``binary.h``, ``unary.h``, ``ternary.h``, ``utils.h``) and
the primitives' own ``eval_cpu``; ``is_fusable`` of ``mlx/compile.cpp``. Knows no framework.
"""

from __future__ import annotations

VIEWS = {
    "Transpose",
    "Broadcast",
    "ExpandDims",
    "Squeeze",
    "Slice",
    "Split",
    "Depends",
    "Copy",
    "StopGradient",
    "CustomTransforms",
    "AsStrided",
}
"""Their output looks at the buffer of an input."""

SHAPES = {"Reshape", "Flatten", "Unflatten", "View"}
"""Their output looks at the input's buffer where its strides allow that, else it is a copy."""

_UNARY = {
    "Abs",
    "ArcCos",
    "AsType",
    "BitwiseInvert",
    "Ceil",
    "Cos",
    "Erf",
    "ErfInv",
    "Exp",
    "Expm1",
    "Floor",
    "Log",
    "Log1p",
    "LogicalNot",
    "Negative",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sqrt",
    "Square",
    "Tan",
    "Tanh",
}
_BINARY = {
    "Add",
    "ArcTan2",
    "BitwiseBinary",
    "Divide",
    "Equal",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogAddExp",
    "LogicalAnd",
    "LogicalOr",
    "Maximum",
    "Minimum",
    "Multiply",
    "NotEqual",
    "Power",
    "Remainder",
    "Select",
    "Subtract",
}
ELEMENTWISE = {*_UNARY, *_BINARY, "Rsqrt", "Compiled"}
"""One output element for each input element: the output may take over an input's buffer."""

FUSABLE = {
    *_UNARY,
    *_BINARY,
    "ArcCosh",
    "ArcSin",
    "ArcSinh",
    "ArcTan",
    "ArcTanh",
    "Broadcast",
    "Conjugate",
    "Cosh",
    "Imag",
    "Real",
    "Sinh",
}
"""What ``mx.compile`` makes one kernel of."""

IN_PLACE = {
    "LayerNorm",
    "RMSNorm",
    "RMSNormVJP",
    "RoPE",
    "Scatter",
    "ScatterAxis",
    "SliceUpdate",
    "Softmax",
}
"""They write over their first input where it may be written over."""

COPY_FIRST = {"AddMM", "Scatter", "ScatterAxis", "SliceUpdate"}
"""Where they may not, they first copy it, in a dispatch of its own."""

PRODUCTS = {"AddMM", "GatherMM", "GatherQMM", "Matmul", "QuantizedMatmul"}
"""They copy operands whose rows are not laid out as the product needs them."""
