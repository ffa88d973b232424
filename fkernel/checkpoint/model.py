"""A Hugging Face causal language model, or a LoRA adapter on one, ready to be differentiated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.files import first_line, plain, read_json
from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.checkpoint.weights import INDEX, shards_of
from fkernel.errors import CheckpointError, ModelError

HUB = "hub:"
"""Prefix of a model that may be fetched: hub:org/name. Everything else is a directory, and nothing is fetched."""
ADAPTER = "adapter_config.json"
RANDOM = ("pissa_niter", "loftq", "corda", "lora_ga")
"""Initialisations that take a part out of the base model's weights, by chance or by data, each time an adapter is made:
the base that the training had is in no file. PiSSA by a whole decomposition and OLoRA give the same base again."""
EXACT = ("pissa", "olora")


@libraries_quiet()
def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """Load what `save_pretrained` wrote, with eager attention, in eval mode; offline, unless a hub id is named.

    Args:
        path: a directory with `config.json` and safetensors weights, one file or shards; or "hub:org/name".
        dtype: of the parameters: float32, or float64 for laws. Half precision is widened, which is exact.
        trust_remote_code: whether code that came with the model may be executed.

    Returns:
        A transformers causal language model.

    Raises:
        ModelError: no such directory, no model in it, weights that are not safetensors or not all the model's.
    """
    from transformers import AutoModelForCausalLM

    source = _source(path)
    if isinstance(source, Path):
        _check_files(source)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            source,
            attn_implementation="eager",
            dtype=dtype,
            local_files_only=isinstance(source, Path),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and its models raise whatever they like
        raise ModelError(f"transformers loads no causal language model from {path}: {first_line(error)}") from error
    model, loading_info = found
    for what, names in (("lacks", loading_info["missing_keys"]), ("has foreign", loading_info["unexpected_keys"])):
        if names:  # transformers would go on with random weights
            shown = sorted(map(str, names))
            raise ModelError(f"The weights at {path} {what} {len(shown)} parameter(s), such as {shown[0]!r}.")
    return _of_its_own(model.eval())


def _check_files(source: Path) -> None:
    """Raise where a directory's weights are no safetensors, or their index is none."""
    if (source / INDEX).is_file():
        try:
            shards_of(source)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{source / INDEX} is no index of weights: {first_line(error)}.") from error
    elif not (source / "model.safetensors").is_file() and any(source.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{source} holds weights as pytorch_model*.bin, which are pickles, and no safetensors; convert them: "
            f"AutoModelForCausalLM.from_pretrained({str(source)!r}).save_pretrained(another directory)."
        )


def _of_its_own(model: Any) -> Any:
    """Copy weights out of the mapped file: a training may write it anew while they are used."""
    for leaf in (*model.parameters(), *model.buffers()):
        if type(leaf) in (torch.Tensor, torch.nn.Parameter):
            leaf.data = leaf.data.clone()
    return model


@libraries_quiet()
def load_adapter(
    path: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    name: str = "default",
) -> Any:
    """Load a PEFT adapter on its base model, the adapter's parameters trainable and the base's frozen.

    Args:
        path: a directory with `adapter_config.json`.
        base: the base model's directory or "hub:org/name"; by default what the adapter recorded, where that is a
            directory here.
        dtype: as in `load_model`.
        trust_remote_code: as in `load_model`.
        name: the adapter's, which is a part of its parameters' names.

    Raises:
        ModelError: peft is not installed, the base is not here, the adapter does not fit it, or it was made in a way
            that changed the base and cannot be done again.
    """
    try:
        from peft import PeftModel  # an optional package
    except ImportError:
        raise ModelError(f"{path} is a PEFT adapter; install peft to load it: pip install 'fkernel[peft]'.") from None
    config = read_json(Path(path) / ADAPTER, "a PEFT adapter's configuration")
    recorded, made = config.get("base_model_name_or_path"), str(config.get("init_lora_weights")).lower()
    if made.startswith(RANDOM):
        raise ModelError(
            f"The adapter at {path} has init_lora_weights={config['init_lora_weights']!r}, which took a part "
            f"out of the base model's weights that is drawn or computed anew whenever the adapter is loaded: the base "
            f"that was trained is in no file, and log-probabilities would be off by whole nats. Convert the adapter "
            f"where it was trained: save_pretrained(path_initial_model_for_weight_conversion=…), or merge_and_unload()."
        )
    if base is None and not (recorded and Path(recorded).is_dir()):
        raise ModelError(
            f"The adapter at {path} records its base model as {recorded!r}, which is no directory here; say where it "
            f"is: base='directory', or base='hub:org/name'."
        )
    as_made = torch.float32 if made in EXACT else dtype  # its decomposition is not made in float64
    model = load_model(base or recorded, dtype=as_made, trust_remote_code=trust_remote_code)
    try:
        adapted = PeftModel.from_pretrained(
            model, str(path), adapter_name=name, is_trainable=True, autocast_adapter_dtype=False
        )
        _of_its_own(adapted)
    except Exception as error:
        raise ModelError(
            f"The adapter at {path} does not fit its base model {base or recorded}: {plain(error)}"
        ) from error
    return adapted.to(dtype).eval()


@libraries_quiet()
def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer beside a model; None where a directory holds none.

    Raises:
        CheckpointError: its files are there, and no tokenizer can be made of them.
    """
    source = _source(path, "tokenizer_config.json")
    if isinstance(source, Path) and not any((source / name).is_file() for name in TOKENIZER):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source, local_files_only=isinstance(source, Path), trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise CheckpointError(f"transformers loads no tokenizer from {path}: {first_line(error)}") from error


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def _source(path: str | Path, wanted: str = "config.json") -> Path | str:
    """Tell a directory from the name of a model that may be fetched."""
    if str(path).startswith(HUB):
        return str(path).removeprefix(HUB)
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"There is no directory {path}; a model that may be fetched is named {HUB}org/name.")
    if wanted == "config.json" and not (directory / wanted).is_file():
        found = sorted(item.name for item in directory.iterdir())
        raise ModelError(f"{directory} holds no config.json ({found}); expected a directory of save_pretrained().")
    return directory
