"""The policy of a recording: what it was built from is kept beside the steps, and built again.

    model/policy.json            the base model's directory, attention, dtypes and norms of what was not trained
    model/config.json            the architecture; adapter_config.json of an adapter; files of the tokenizer

What was trained is in the snapshots. What was not comes from the base model, which is read where it lies, and must be
the one that the training had: norms are compared, parameter by parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fkernel.checkpoint import architecture, load_model, load_tokenizer
from fkernel.errors import ModelError, StoreError, listing
from fkernel.io import atomic_directory, checksummed_json, read_checksummed, write_file
from fkernel.record.gradients import leaf_norm
from fkernel.shapes import Tensor, Tree

MODEL, POLICY, ADAPTER = "model", "policy.json", "adapter_config.json"
SAME_NORM = 1e-5
"""Relative difference up to which the norm of a frozen parameter is the same."""


def keep_policy(directory: Path, model: nn.Module, trained: Mapping[str, Tensor], tokenizer: Any) -> None:
    """Write what a model was built from; one that is there is left as it is.

    Args:
        directory: of the recording.
        model: bare; nothing is written of one that is not transformers', and whoever reads the recording gives it.
        trained: {name: parameter}.
        tokenizer: None for none.
    """
    place, config = directory / MODEL, getattr(model, "config", None)
    if place.exists() or not hasattr(config, "save_pretrained"):
        return
    adapters = getattr(model, "peft_config", None)
    rest = {name: leaf for name, leaf in model.named_parameters() if name not in trained}
    about = {
        "base": _base(config, adapters) if rest else None,
        "attention": getattr(config, "_attn_implementation", None),
        "dtypes": {name: str(leaf.dtype)[6:] for name, leaf in rest.items()},
        "norms": {name: float(leaf_norm(leaf)) for name, leaf in rest.items()},
    }
    with atomic_directory(place) as work:
        assert config is not None
        config.save_pretrained(work)
        if adapters is not None:
            (work / ADAPTER).unlink(missing_ok=True)
            next(iter(adapters.values())).save_pretrained(str(work))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(work))
        write_file(work / POLICY, [checksummed_json(about)])


def load_policy(
    directory: Path,
    trained: Mapping[str, Any],
    *,
    base: str | Path | None = None,
    attention: str | None = "eager",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Build the policy of a recording again; what was trained of it is to be filled in from a snapshot.

    Args:
        directory: of the recording.
        trained: {name: shape} of what was trained.
        base: the base model's directory, where it is no longer where the training read it.
        attention: as transformers names it; None for the training's own.
        trust_remote_code: whether the model's own code may be executed.

    Returns:
        The model in eval mode, frozen parameters in the training's dtypes, trained ones in float32.

    Raises:
        ModelError: the recording has no architecture, its base model is not there, or is another one.
    """
    place, about = directory / MODEL, _about(directory)
    if about is None:
        raise ModelError(
            f"{str(directory)!r} records a model that is not transformers', so that its architecture is not kept; give "
            f"the model."
        )
    dtypes = about["dtypes"]
    if dtypes:
        model = load_model(_there(base or about["base"], directory, dtypes), trust_remote_code=trust_remote_code)
    else:
        model = architecture(place, trust_remote_code)
        for leaf in model.parameters():
            leaf.data = torch.zeros(leaf.shape, dtype=leaf.dtype)  # an architecture's weights have no memory
    model.set_attn_implementation(attention or about["attention"] or "eager")
    if (place / ADAPTER).is_file():
        model = _adapted(model, place)
    _check_names(model, trained, place)
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(name in trained)
        if name in dtypes:
            leaf.data = leaf.data.to(getattr(torch, dtypes[name]))
    _check_norms(model, about["norms"], base or about["base"])
    return model.eval()


def tokenizer_of(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a recording, or None.

    Args:
        directory: of the recording.
        trust_remote_code: whether the tokenizer's own code may be executed.
    """
    place = directory / MODEL
    return load_tokenizer(place, trust_remote_code=trust_remote_code) if place.is_dir() else None


def attention_of(directory: Path) -> str | None:
    """The attention that was trained with, or None."""
    about = _about(directory)
    return None if about is None else about["attention"]


def _about(directory: Path) -> dict[str, Any] | None:
    place = directory / MODEL / POLICY
    if not place.is_file():
        return None
    try:
        return read_checksummed(place)
    except (OSError, ValueError) as error:
        raise StoreError(f"{str(place)!r} cannot be read: {error}") from error


def fill(model: nn.Module, params: Tree) -> None:
    """Put parameters into a model, by name, in the model's dtypes."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, leaf in params.items():
            own[name].copy_(leaf)


def _base(config: Any, adapters: Any) -> str | None:
    names = [getattr(each, "base_model_name_or_path", None) for each in (adapters or {}).values()]
    found = next((name for name in [*names, getattr(config, "_name_or_path", None)] if name), None)
    return str(Path(found).resolve()) if found and Path(found).is_dir() else found


def _there(base: str | Path | None, directory: Path, frozen: Mapping[str, str]) -> str | Path:
    if base is None or not (str(base).startswith("hub:") or Path(base).is_dir()):
        raise ModelError(
            f"{str(directory)!r} holds what was trained; {len(frozen)} parameters were not ({listing([*frozen], 2)}), "
            f"and come from the base model, {str(base)!r}, which is no directory here. Say where it is: "
            f"base='directory', or base='hub:org/name'."
        )
    return base


def _adapted(model: Any, place: Path) -> nn.Module:
    try:
        from peft import PeftConfig, get_peft_model  # an optional package
    except ImportError:
        raise ModelError("The recording is of a PEFT adapter; install peft: pip install 'fkernel[peft]'.") from None
    config = PeftConfig.from_pretrained(str(place))
    config.inference_mode = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def _check_names(model: nn.Module, trained: Mapping[str, Any], place: Path) -> None:
    own = {name: [*leaf.shape] for name, leaf in model.named_parameters()}
    wrong = [name for name, shape in trained.items() if own.get(name) != [*shape]]
    if wrong:
        raise ModelError(
            f"The model of {str(place)!r} has no {listing(wrong)} of the shapes that were trained. Was its code, or "
            f"transformers, another version's?"
        )


def _check_norms(model: nn.Module, norms: Mapping[str, float], base: Any) -> None:
    own = dict(model.named_parameters())
    for name, norm in norms.items():
        now = float(leaf_norm(own[name])) if name in own else float("nan")
        if not abs(now - norm) <= SAME_NORM * max(norm, 1e-30):
            raise ModelError(
                f"{name!r} was not trained, and had norm {norm:.7g}; that of the base model at {str(base)!r} is "
                f"{now:.7g}: it is not the one that was trained on. Give the right one (base=); a base that was "
                f"quantised for the training is not repeated."
            )
