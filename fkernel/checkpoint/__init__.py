"""From files to what the engine takes: a model, and AdamW's state keyed by parameter name."""

from fkernel.checkpoint.model import load_model
from fkernel.checkpoint.optimizer import adamw_state, load_adamw_state

__all__ = ["adamw_state", "load_adamw_state", "load_model"]
