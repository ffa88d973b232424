"""Where a DeepSpeed checkpoint's files lie: the directory of its tag, and what its trainer saved around it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fkernel.checkpoint.layout import TRAINER_STATE, Layout
from fkernel.checkpoint.model import ADAPTER
from fkernel.errors import CheckpointError, listing
from fkernel.io import inside

LATEST = "latest"
SCRIPT = "zero_to_fp32.py"
"""What DeepSpeed copies beside every checkpoint of ZeRO."""
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<parallel>\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?P<half>bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<parallel>\d+)_optim_states\.pt")


class Files(NamedTuple):
    """The files of one tag.

    Attributes:
        model: the model's states: one file, or one a rank under ZeRO-3, in the order of the ranks.
        optimizer: the optimizer's, one a rank under ZeRO, in that order; () without ZeRO.
        sliced: whether every parameter is cut into ranks' parts (ZeRO-3).
    """

    model: tuple[Path, ...]
    optimizer: tuple[Path, ...]
    sliced: bool


def find(root: Path) -> Layout | None:
    """Tell whether a directory is a DeepSpeed checkpoint: a tag's, or one that holds tags.

    Raises:
        CheckpointError: several tags are there, and no file `latest` says which of them.
    """
    if not root.is_dir():
        return None
    if _is_tag(root):
        return _layout(root.parent, root)
    for around in (root, root / "_actor"):
        if (around / LATEST).is_file():
            try:
                tag = inside(around, (around / LATEST).read_text(encoding="utf-8", errors="replace").strip())
            except ValueError as error:
                raise CheckpointError(f"{around / LATEST} is no name of a checkpoint: {error}.") from error
            return _layout(around, tag) if _is_tag(tag) or (around / SCRIPT).is_file() else None
    tags = sorted(item for item in root.iterdir() if _is_tag(item))
    if len(tags) > 1:
        raise CheckpointError(
            f"{root} holds {len(tags)} DeepSpeed checkpoints ({listing([tag.name for tag in tags])}), and no file "
            f"'{LATEST}' that says which; name one's directory, such as {tags[-1]}."
        )
    return _layout(root, tags[0]) if tags else None


def files_of(tag: Path) -> Files:
    """List the files of a tag, in the order of the ranks, and check that they are of one training by data alone.

    Raises:
        CheckpointError: a rank's file is missing, or files lie there that another kind of parallelism writes.
    """
    if not tag.is_dir():
        raise CheckpointError(f"There is no directory {tag}, which the file '{LATEST}' beside it names; copy it too.")
    names = sorted(item.name for item in tag.iterdir())
    _check_known(tag, names)
    model = {match["rank"]: tag / match[0] for name in names if (match := MODEL.fullmatch(name))}
    optimizer = {match["rank"]: tag / match[0] for name in names if (match := OPTIMIZER.fullmatch(name))}
    halves = {match["half"] for name in names if (match := OPTIMIZER.fullmatch(name))}
    if not model:
        raise CheckpointError(f"{tag} holds no *model_states.pt ({listing(names)}); expected those of DeepSpeed.")
    if len(halves) > 1 or (None in model and len(model) > 1):
        raise CheckpointError(
            f"{tag} holds files of two trainings: {listing(names)}. Keep those of one of them: zero_pp_rank_*_model_"
            f"states are ZeRO-3's, mp_rank_00_model_states another stage's; bf16_* are of bfloat16."
        )
    sliced = None not in model
    ranks = _in_order(tag, optimizer, "optim_states") if optimizer else ()
    models = _in_order(tag, model, "model_states") if sliced else (model[None],)
    if sliced and optimizer and len(ranks) != len(models):
        raise CheckpointError(
            f"{tag} holds model states of {len(models)} ranks and optimizer states of {len(ranks)}; each rank saved "
            f"both. Copy the files that are missing."
        )
    return Files(models, ranks, sliced)


def _layout(around: Path, tag: Path) -> Layout:
    """Say where the weights and the architecture are: beside the tag, where save_pretrained wrote them."""
    whole = (around / "config.json").is_file() and any((around / name).is_file() for name in WEIGHTS)
    exported = around.parent / f"{tag.name}_hf"  # OpenRLHF's --save_hf_ckpt
    config = next((place for place in (around, exported) if (place / "config.json").is_file()), None)
    return Layout(
        "deepspeed",
        around if whole or (around / ADAPTER).is_file() else tag,
        optimizer=tag,
        scheduler=next((around / n for n in ("scheduler.pt", "scheduler.bin") if (around / n).is_file()), None),
        trainer_state=around / TRAINER_STATE if (around / TRAINER_STATE).is_file() else None,
        config=config,
    )


def _is_tag(place: Path) -> bool:
    return place.is_dir() and any(
        MODEL.fullmatch(item.name) or OPTIMIZER.fullmatch(item.name) for item in place.iterdir()
    )


def _check_known(tag: Path, names: list[str]) -> None:
    """Raise where other kinds of parallelism left their files, or the state is elsewhere."""
    parallel = [match for name in names if (match := MODEL.fullmatch(name) or OPTIMIZER.fullmatch(name))]
    split = [match[0] for match in parallel if int(match["parallel"]) > 0]
    layers = [name for name in names if name.startswith(("layer_", "expp_rank_", "expert_"))]
    swapped = [name for name in names if name == "offloaded_tensors"]
    universal = [name for name in names if name == "zero"]
    for found, what in (
        (split, "was trained with tensor parallelism (mp_rank_01 and on)"),
        (layers, "was trained with expert or pipeline parallelism"),
        (swapped, "keeps its optimizer in files of the NVMe offload, which hold no names"),
        (universal, "was converted to DeepSpeed's universal format; load the checkpoint that it was made from"),
    ):
        if found:
            raise CheckpointError(
                f"{tag} {what}: {listing(found)}. Read are DeepSpeed checkpoints of data parallelism, ZeRO-0 to 3."
            )


def _in_order(tag: Path, files: dict[str | None, Path], what: str) -> tuple[Path, ...]:
    """Order ranks as numbers, and miss none."""
    ordered = {int(rank or 0): path for rank, path in files.items()}
    missing = sorted({*range(max(ordered) + 1)} - {*ordered})
    if missing:
        name = ordered[max(ordered)].name.replace(f"rank_{max(ordered)}_", f"rank_{missing[0]}_")
        raise CheckpointError(
            f"{tag} lacks {name}: there are {what} of the ranks {sorted(ordered)}, and each rank has saved one. Copy "
            f"the files that are missing from where the training saved them."
        )
    return tuple(ordered[rank] for rank in sorted(ordered))
