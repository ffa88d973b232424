"""Tensors as a safetensors file, in chunks: through a checksum, without a copy of all of them in memory.

    8 bytes                length of the header, little-endian
    header                 JSON: each tensor's dtype, shape and offsets; texts under __metadata__
    tensors                one after the other, widest dtype first, so that each begins at a multiple of its own width

Any reader of safetensors opens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch

from fkernel.io.fingerprints import tensor_chunks
from fkernel.shapes import Tensor

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_MORE = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"}
_MORE |= {torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64"}
_ALIGNMENT = 64


def tensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, tuple[Tensor, ...]]:
    """The bytes before the tensors, and the tensors in file order.

    Raises:
        KeyError: a dtype that safetensors has not.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES.get(tensor.dtype) or _MORE[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, tuple(tensor for _, tensor in ordered)


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Iterate over the bytes of a safetensors file; a contiguous tensor on the CPU is not copied.

    Args:
        tensors: {name: [*shape]}, of any strides and devices; those that share memory are written each.

    Example:
        >>> from safetensors.torch import load
        >>> load(b"".join(safetensors_chunks({"w": torch.eye(2), "n": torch.tensor(3)})))["n"]
        tensor(3)
    """
    header, ordered = tensors_header(tensors, {})
    yield header
    for tensor in ordered:
        if tensor.numel():
            yield from tensor_chunks(tensor)
