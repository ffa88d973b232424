"""Parameters' names as their model has them, whatever was wrapped around it when they were written."""

from __future__ import annotations

from collections.abc import Container

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
"""What torch.compile, FSDP, activation checkpointing and DDP put into the names of the parameters inside; DDP's is the
end of two others."""


def unwrapped(name: str, known: Container[str]) -> str:
    """Take wrappers' parts out of a name, where that makes a known one of it.

    Example:
        >>> unwrapped("module._orig_mod.lm_head.weight", {"lm_head.weight"})
        'lm_head.weight'
        >>> unwrapped("_fsdp_wrapped_module.lm_head._checkpoint_wrapped_module.weight", {"lm_head.weight"})
        'lm_head.weight'
    """
    bare = name
    for part in WRAPPERS:
        bare = bare.replace(part, "")
    return bare if name not in known and bare in known else name
