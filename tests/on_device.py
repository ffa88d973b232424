"""Run tests on another device: `FKERNEL_DEVICE=cuda pytest -p tests.on_device tests/test_laws.py …`.

What the tests make, they make there; what the package makes must follow its inputs.
"""

from __future__ import annotations

import os
from typing import Any

import torch

DEVICE = os.environ.get("FKERNEL_DEVICE", "cpu")


class Generator(torch.Generator):
    """A generator of the device, where none is named."""

    def __new__(cls, device: Any = DEVICE) -> Any:
        """Make one."""
        return super().__new__(cls, device=device)  # pyright: ignore[reportCallIssue]


torch.Generator = Generator  # pyright: ignore[reportAttributeAccessIssue]
torch.set_default_device(DEVICE)
torch.backends.cuda.matmul.allow_tf32 = False
