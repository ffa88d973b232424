"""Attaching a recorder to a trainer: which kind it is, what hides its log-probabilities, and when its steps begin.

    GRPO, RLOO       record/trl.py           their method that returns log-probabilities and entropies is tapped
    SFT, Trainer     record/supervised.py    log-probabilities of the model's pass, or its cross entropy
    DPO              record/preference.py    the same, with pairs and the reference

Methods are replaced on the trainer that is attached, not on its class.
"""

from __future__ import annotations

from typing import Any

from fkernel.errors import ModelError
from fkernel.io import is_json
from fkernel.record.preference import Preference
from fkernel.record.supervised import Supervised
from fkernel.record.trl import LOGPS, PolicyGradient

KINDS: dict[str, type[Supervised]] = {"DPOTrainer": Preference, "Trainer": Supervised}
"""What is made for a class, the first that the trainer's own derives from."""
SETTINGS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "ld_alpha",
    "epsilon",
    "num_generations",
    "num_iterations",
    "temperature",
    "max_completion_length",
    "scale_rewards",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "seed",
)
"""Of a trainer's arguments, those that are kept: they say what the loss was, and must be the same on resuming."""


def attach_to(recorder: Any, trainer: Any) -> None:
    """Attach a recorder to a trainer.

    Args:
        recorder: without a model.
        trainer: made, not yet training.

    Raises:
        ModelError: it is of no known kind, or hides its log-probabilities; it says how.
    """
    attached = kind_of(trainer)(recorder, trainer)
    refuse_hidden(trainer, attached.hidden())
    recorder.tokenizer = recorder.tokenizer or text_tokenizer(trainer)
    recorder.log = recorder.log or _log_of(trainer)
    for name in attached.methods:
        if hasattr(trainer, name):
            setattr(trainer, name, getattr(attached, name.lstrip("_"))(getattr(trainer, name)))
    trainer.add_callback(_callback(recorder, trainer, attached.head))


def kind_of(trainer: Any) -> type[PolicyGradient] | type[Supervised]:
    """Tell how a trainer is listened to.

    Args:
        trainer: any.

    Raises:
        ModelError: it is of no known kind.

    Example:
        >>> kind_of(object())
        Traceback (most recent call last):
        fkernel.errors.ModelError: object is no trainer that can be attached. Expected TRL's GRPOTrainer, ...
    """
    if all(hasattr(trainer, method) for method in (LOGPS, "compute_loss", "add_callback")):
        return PolicyGradient
    names = [each.__name__ for each in type(trainer).__mro__]
    for name, kind in KINDS.items():
        if name in names and all(hasattr(trainer, method) for method in (*kind.methods, "add_callback")):
            return kind
    raise ModelError(
        f"{type(trainer).__name__} is no trainer that can be attached. Expected TRL's GRPOTrainer, RLOOTrainer (with "
        f"their method {LOGPS!r}), SFTTrainer or DPOTrainer, or a Trainer of transformers. In a loop of your own, "
        f"recorder.tap takes log-probabilities."
    )


def refuse_hidden(trainer: Any, more: dict[str, bool]) -> None:
    """Refuse a trainer whose log-probabilities, or loss, cannot be seen.

    Args:
        trainer: of a known kind.
        more: what its kind refuses beside that, and whether it is there.

    Raises:
        ModelError: it is such a one.

    Example:
        >>> refuse_hidden(object(), {"a loss of your own": True})
        Traceback (most recent call last):
        fkernel.errors.ModelError: object uses a loss of your own. A record of it would be wrong, ...
    """

    def option(name: str) -> bool:
        return any(bool(getattr(place, name, False)) for place in (trainer, getattr(trainer, "args", None)))

    model_config = getattr(getattr(trainer, "model", None), "config", None)
    routers = bool(getattr(model_config, "output_router_logits", False))
    dims = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
    split = max(getattr(dims, f"{kind}_size", 1) or 1 for kind in ("tp", "cp", "sp"))
    hidden = {
        "a liger loss, which computes log-probabilities within the loss (use_liger_loss=False)": option(
            "use_liger_loss"
        ),
        "packed batches, where a row is several sequences (packing=False)": option("packing"),
        "batches without padding, where a row is several sequences (padding_free=False)": option("padding_free"),
        "an auxiliary loss of the routers, which is no function of log-probabilities (router_aux_loss_coef=0)": (
            option("aux_loss_enabled") or (routers and getattr(model_config, "router_aux_loss_coef", 0.0) != 0)
        ),
        "noise on embeddings, which no recording repeats (neftune_noise_alpha=None)": option("neftune_noise_alpha"),
        "an encoder and a decoder; only causal language models are recorded": bool(
            getattr(model_config, "is_encoder_decoder", False)
        ),
        "DeepSpeed, which keeps gradients to itself": option("is_deepspeed_enabled"),
        "FSDP, which scatters parameters": option("is_fsdp_enabled"),
        "tensor, context or sequence parallelism, where a process has parts of a sequence": split > 1,
        "DataParallel, several devices in one process (launch one process a device)": int(
            getattr(getattr(trainer, "args", None), "n_gpu", 1) or 1
        )
        > 1,
        **more,
    }
    for what, there in hidden.items():
        if there:
            raise ModelError(
                f"{type(trainer).__name__} uses {what}. A record of it would be wrong, so that nothing is recorded."
            )


def text_tokenizer(trainer: Any) -> Any:
    """The tokenizer of a trainer, or of its processor."""
    processor = getattr(trainer, "processing_class", None)
    return getattr(processor, "tokenizer", processor)


def precision_of(trainer: Any, head: str) -> dict[str, Any]:
    """Temperature, autocast and head of a trainer, as `Recorder.bind` takes them.

    Args:
        trainer: any.
        head: "trl" where log-probabilities come from TRL's language-model head, else "linear".

    Example:
        >>> precision_of(object(), "linear")
        {'temperature': 1.0, 'autocast': None, 'head': 'linear'}
    """
    mixed = getattr(getattr(trainer, "accelerator", None), "mixed_precision", "no")
    return {
        "temperature": float(getattr(trainer, "temperature", None) or 1.0),
        "autocast": "bfloat16" if mixed == "bf16" else None,
        "head": head,
    }


def _log_of(trainer: Any) -> Any:
    """The log of transformers' Trainer, beside what the trainer logs by itself.

    TRL's own log ends the means that it logs next, so that it is not called between; and a log of any kind takes the
    step's own for done.
    """
    from transformers import Trainer

    def log(values: dict[str, float]) -> None:
        due = trainer.control.should_log
        Trainer.log(trainer, values)
        trainer.control.should_log = due

    return log


def _callback(recorder: Any, trainer: Any, head: str) -> Any:
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            settings = {key: _plain(value) for key, value in vars(args).items() if is_json(_plain(value))}
            arguments = {key: settings[key] for key in SETTINGS if key in settings}
            processes = int(getattr(trainer.accelerator, "num_processes", 1))
            arguments |= {"num_processes": processes} if processes > 1 else {}
            about = {"trainer": type(trainer).__name__, "arguments": arguments}
            recorder.bind(trainer.model_wrapped, trainer.optimizer, **about, **precision_of(trainer, head))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            scaler = getattr(trainer.accelerator, "scaler", None)
            recorder.begin(state.global_step, scaler, {"seed": args.seed, "epoch": state.epoch})

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.end()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.close()

    return Recording()


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
