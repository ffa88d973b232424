"""Megatron-Core's distributed checkpoints, as verl, NeMo-RL's Megatron workers, slime and Megatron-LM leave them.

    .metadata, *.distcp                  torch.distributed.checkpoint of Megatron's names, whole tensors:
        decoder.layers.mlp.…             the weights, layers stacked
        optimizer.state.param.<name>     float32 masters
        optimizer.state.exp_avg.<name>, optimizer.state.exp_avg_sq.<name>
    common.pt                            what is no tensor: the optimizer's parameter groups and steps; newer versions
                                         keep it in the above, as common_state
    metadata.json                        {"sharded_backend": "torch_dist", …}

    verl          global_step_N/actor/{dist_ckpt,huggingface}/      NeMo-RL    step_N/policy/weights/iter_0000000/
    slime         iter_%07d/

That is the form "fully_reshardable". The others keep flat buffers whose parts have no names, and are refused.
Parameter groups do not say which parameters they have: Megatron's rule is that vectors and biases are those of
wd_mult=0, which do not decay. The names of Hugging Face's parameters are `fkernel.checkpoint.formats.megatron_names`.

Source: megatron-core 0.16.1, `optimizer/distrib_optimizer.py` (sharded_param_state_fully_reshardable) and
`optimizer/__init__.py` (get_standard_config_overrides); its later `dist_checkpointing/serialization.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.distributed import METADATA, read_distributed, read_metadata
from fkernel.checkpoint.files import Inert, first_line, read_tensors
from fkernel.checkpoint.formats.megatron_names import gather, pieces_of
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.weights import read_safetensors
from fkernel.errors import CheckpointError, OptimizerStateError, listing
from fkernel.shapes import Tree

COMMON, BACKEND = "common.pt", "metadata.json"
EMBEDDED = "common_state/shard_0_1"
STATE = "optimizer.state."
KINDS = ("param", "exp_avg", "exp_avg_sq")
ASIDE = ("_extra_state", "rng_state", "rerun_state", "optimizer.distributed.")
OPTION = "dist_ckpt_optim_fully_reshardable=True"
SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "bias_correction", "decoupled_weight_decay")
"""What a parameter group says of the step; the rest is how Megatron came to it."""
INERT = ("argparse.Namespace", "megatron.core.transformer.enums.AttnBackend", "signal.Signals")
"""What Megatron-LM's arguments in common.pt are made of, besides numbers and dtypes."""


def find(root: Path) -> Layout | None:
    """Tell a checkpoint of Megatron's by metadata.json beside .metadata; None where there is none.

    Args:
        root: its directory, or one above it as verl, NeMo-RL and slime name them.

    Raises:
        CheckpointError: it holds several, of different iterations.
    """
    root = root.absolute()
    for place in (root, root / "actor", root / "policy" / "weights", root / "weights"):
        for inside in (place, place / "dist_ckpt", place / "optimizer" / "dist_ckpt"):
            if _is_megatron(inside):
                return _layout(inside)
        iterations = [each for each in sorted(place.glob("iter_*")) if _is_megatron(each)]
        if len(iterations) > 1:
            raise CheckpointError(f"{place} holds {len(iterations)} checkpoints; name one of them: {iterations[-1]}.")
        if iterations:
            return _layout(iterations[0])
    return None


def _is_megatron(place: Path) -> bool:
    return (place / METADATA).is_file() and (place / BACKEND).is_file()


def _layout(place: Path) -> Layout:
    """Where verl keeps the configuration and tokenizer, and the weights where it exports them."""
    exports = [above / "huggingface" for above in (place.parent, place.parent.parent)]
    config = next((each for each in exports if (each / "config.json").is_file()), None)
    return Layout("megatron", place, place, config=config)


def read(layout: Layout, model: Any, optimizer: bool = True) -> Saved:
    """Read weights, masters and moments under the model's own names.

    Arguments and errors as in `fkernel.checkpoint.formats.read`.
    """
    place = layout.model
    keys = [*read_metadata(place).state_dict_metadata]
    tensors = [key for key in keys if not any(part in key for part in ASIDE)]
    names = [key for key in tensors if not key.startswith(STATE) and key != EMBEDDED]
    weights = _tree(place, "", pieces_of(model, names, place)) if names else _exported(layout)
    if not optimizer or not any(key.startswith("optimizer.") for key in keys):
        return Saved(weights)
    _check_form(keys, place)
    kinds = sorted({key[len(STATE) :].partition(".")[0] for key in tensors if key.startswith(STATE)})
    if kinds != sorted(KINDS):
        raise OptimizerStateError(
            f"{place} holds {listing([STATE + kind for kind in kinds])}; expected {listing(KINDS)}, as the distributed "
            f"optimizer of Adam has them."
        )
    stored = [key[len(f"{STATE}param.") :] for key in tensors if key.startswith(f"{STATE}param.")]
    pieces = pieces_of(model, stored, place, whole=False)
    masters, exp_avg, exp_avg_sq = (_tree(place, f"{STATE}{kind}.", pieces) for kind in KINDS)
    groups = _groups(place, keys)
    state: dict[str, dict[str, Any]] = {}
    for name, master in masters.items():
        step = _group_of(master, groups)["step"]
        state[name] = {"step": step, "exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
        state[name] |= _master(name, master, weights, place)
    named = [
        {"params": [name for name, leaf in masters.items() if _group_of(leaf, groups) is group]}
        | {key: value for key, value in group.items() if key in SETTINGS}
        for group in groups
    ]
    return Saved(weights, {"state": state, "param_groups": named})


def _check_form(keys: list[str], place: Path) -> None:
    """Raise unless the optimizer's state is in whole tensors that have names."""
    flat = [key for key in keys if key.startswith("optimizer.distributed.") or ".gbuf_idx_" in key]
    older = [key for key in keys if key.startswith(f"{STATE}fp32_param.")]
    if flat or older:
        form = "dp_reshardable, flat buffers without names" if flat else "fully_sharded_model_space, flattened pieces"
        raise OptimizerStateError(
            f"{place} holds {(flat or older)[0]!r}: the optimizer's state in the form {form}. Save it with {OPTION} "
            f"(Megatron-LM: --dist-ckpt-optim-fully-reshardable), or say optimizer=False to load the weights alone."
        )


def _tree(place: Path, prefix: str, pieces: Mapping[str, Any]) -> Tree:
    """Read one kind of tensors, and cut the model's parameters out of them."""
    keys = {prefix + piece.key for piece in pieces.values()}
    found = {key.removeprefix(prefix): value for key, value in read_distributed(place, keys.__contains__).items()}
    lacking = [key for key in keys if key.removeprefix(prefix) not in found]
    if lacking:
        raise CheckpointError(f"{place} holds no {listing(sorted(lacking))}.")
    return gather(found, pieces, place)


def _exported(layout: Layout) -> Tree:
    """Read the weights that verl exported in Hugging Face's form, where it saves no others."""
    if layout.config is None:
        raise CheckpointError(f"{layout.model} holds no weights, and there is no huggingface/ with any beside it.")
    return read_safetensors(layout.config)


def _master(name: str, master: torch.Tensor, weights: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Give a parameter's float32 master where the weight is its rounding; a float32 weight is its own."""
    weight = weights.get(name)
    if weight is not None and weight.dtype == torch.float32:
        if not torch.equal(weight, master):
            raise OptimizerStateError(
                f"{place} holds {name!r} as a weight and as the optimizer's, both in float32, and they differ: they "
                f"are of different steps."
            )
        return {}
    return {"master_param": master}


def _groups(place: Path, keys: list[str]) -> list[dict[str, Any]]:
    """Read the parameter groups, and check that Megatron's rule says which parameters each has."""
    with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
        if EMBEDDED in keys:
            common: Any = read_distributed(place, EMBEDDED.__eq__)[EMBEDDED]
            common = common[0] if isinstance(common, list) and common else common
        else:
            common = read_tensors(place / COMMON, "what Megatron saves beside tensors, the optimizer's groups among it")
    try:
        groups = [dict(group) for group in common["optimizer"]["optimizer"]["param_groups"]]
        for group in groups:
            group["step"] = float(group["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise OptimizerStateError(
            f"{place / COMMON} holds no parameter groups with their steps of one optimizer, at optimizer.optimizer."
            f"param_groups ({first_line(error)}); several optimizers (experts' of their own) are not brought together."
        ) from error
    _check_iteration(common, place)
    said = [tuple(group.get(key) for key in (*SETTINGS, "step")) for group in groups]
    rules = [group.get("wd_mult", 1.0) for group in groups]
    if all(each == said[0] for each in said):
        return groups[:1]
    if sorted(rules) == [0.0, 1.0] and len({group["step"] for group in groups}) == 1:
        return groups
    raise OptimizerStateError(
        f"The {len(groups)} parameter groups in {place / COMMON} differ in what they do, with wd_mult={rules}, and "
        f"nothing says which parameters each has: known are two, of wd_mult 1 and 0, of vectors and biases."
    )


def _check_iteration(common: Mapping[str, Any], place: Path) -> None:
    """Raise where what lies beside the tensors is of another iteration than the folder's name says."""
    iteration, named = common.get("iteration"), re.fullmatch(r"iter_(\d+)", place.name)
    if named is not None and iteration is not None and int(named[1]) != iteration:
        raise CheckpointError(
            f"{place / COMMON} is of iteration {iteration}, in a folder of iteration {int(named[1])}: it was copied "
            f"from another checkpoint, or the folder was renamed."
        )


def _group_of(parameter: torch.Tensor, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose a parameter's group: a vector's has wd_mult=0, where there are two."""
    if len(groups) == 1:
        return groups[0]
    wanted = 0.0 if parameter.ndim == 1 else 1.0
    return next(group for group in groups if group.get("wd_mult", 1.0) == wanted)
