"""One process of a training with several: started by `launch`, once for each, with a directory and what to do there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fkernel.record import Recorder
from tests.record.loops import MAX_NORM, gpt2, loss_of, statistics, tensors

SMALL = 1e-3
"""ε of AdamW: where a gradient is 0 but for rounding, a smaller one makes whole steps of it, this way or that."""
ORDERS = ((0, 1, 1), (1, 0, 1))
"""The micro-batches of a step, by process; three each, of which the last alone is followed by an average."""


def launch(place: Path, what: str, ranks: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run `what` of this module in several processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent.parent
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.record.worker", str(place), what]
    started = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    done = []
    for each in started:
        try:
            out, err = each.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            each.kill()
            out, err = each.communicate()
        done.append(subprocess.CompletedProcess(command, each.returncode, out, err))
    return done


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=SMALL)


def take(
    recorder: Recorder, model: Any, bare: Any, optimizer: Any, order: tuple[int, ...], share: float, **others: Any
) -> None:
    """One step of some micro-batches, each with its share of the loss; the gradient is averaged in the last pass."""
    with recorder.step() as step:
        for j, i in enumerate(order):
            ids, attention, response, advantages = tensors(i)
            last = j == len(order) - 1
            with nullcontext() if last or model is bare else model.no_sync():
                log_p, entropy = statistics(model, ids, attention)
                both = recorder.tap(
                    log_p,
                    input_ids=ids,
                    attention_mask=attention,
                    response_mask=response,
                    entropy=entropy,
                    advantage=advantages,
                    **others,
                )
                loss = (j + 1) * share * loss_of(both[0], both[1], response, advantages)
                loss.backward()
            step.note(loss=loss.detach())
        torch.nn.utils.clip_grad_norm_(bare.parameters(), MAX_NORM)
        optimizer.step()
    optimizer.zero_grad()


def loop(place: Path, rank: int) -> None:
    """Three recorded steps under DDP."""
    bare = gpt2()
    model, optimizer = DistributedDataParallel(bare), optimizer_of(bare)
    with Recorder(place / "recording", model, optimizer, snapshots="every") as recorder:
        for _ in range(3):
            take(recorder, model, bare, optimizer, ORDERS[rank], 1 / 3)
        assert recorder.last["number"] == 2


def beside(place: Path, rank: int) -> None:
    """The second process has a term in its loss that no log-probability knows of."""
    bare = gpt2()
    model, optimizer = DistributedDataParallel(bare), optimizer_of(bare)
    if rank == 1:
        bare.transformer.wte.weight.register_hook(lambda g: g + 0.1)
    with Recorder(place / "recording", model, optimizer) as recorder:
        take(recorder, model, bare, optimizer, ORDERS[rank], 1 / 3)


def overflow(place: Path, rank: int) -> None:
    """The second process's ω is not finite."""
    bare = gpt2()
    model, optimizer = DistributedDataParallel(bare), optimizer_of(bare)
    with Recorder(place / "recording", model, optimizer) as recorder:
        take(recorder, model, bare, optimizer, ORDERS[rank], float("inf") if rank == 1 else 1.0)


def again(place: Path, rank: int) -> None:
    """A directory that has steps already, and a run that does not say where it is."""
    loop(place, rank)
    loop(place, rank)


def unwrapped(place: Path, _: int) -> None:
    """Without DDP."""
    bare = gpt2()
    Recorder(place / "recording", bare, optimizer_of(bare))


def grpo(place: Path, rank: int) -> None:
    """TRL's GRPOTrainer; what compute_loss was given is kept for each process."""
    from tests.record.test_trl import trainer

    given: list[dict[str, Any]] = []
    mine = place / f"rank-{rank}"  # where the model was saved: only a main process does
    made = trainer(mine, lora=False, per_device_train_batch_size=6, num_generations=4)
    inner = made.compute_loss

    def watched(model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
        given.append({name: leaf.clone() for name, leaf in inputs.items() if isinstance(leaf, torch.Tensor)})
        return inner(model, inputs, *rest, **others)

    made.compute_loss = watched
    Recorder(place / "recording", snapshots="every").attach(made)
    made.train()
    torch.save({"given": given, "log": made.state.log_history}, place / f"given-{rank}.pt")


def supervised(place: Path, rank: int) -> None:
    """TRL's SFTTrainer and a plain Trainer, one after the other."""
    from tests.record.trainers import plain, sft

    for name, made in (("sft", sft), ("plain", plain)):
        mine = place / name / f"rank-{rank}"
        mine.mkdir(parents=True)
        trainer = made(mine)
        Recorder(place / name / "recording", snapshots="every").attach(trainer)
        trainer.train()
        torch.save(trainer.state.log_history, place / name / f"log-{rank}.pt")


def preference(place: Path, rank: int) -> None:
    """TRL's DPOTrainer with an adapter: the reference is the model without it, and without its wrapper."""
    from tests.record.trainers import dpo

    trainer = dpo(place / f"rank-{rank}", lora=True)
    Recorder(place / "recording", snapshots="every").attach(trainer)
    trainer.train()
    torch.save(trainer.state.log_history, place / f"log-{rank}.pt")


WHAT: dict[str, Callable[[Path, int], None]] = {
    each.__name__: each for each in (loop, beside, overflow, again, unwrapped, grpo, supervised, preference)
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    WHAT[sys.argv[2]](Path(sys.argv[1]), distributed.get_rank())
    distributed.barrier()
    distributed.destroy_process_group()
