"""A run that froze a part of its model: what the optimizer does not have does not require grad, and is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint, func
from fkernel.checkpoint.order import find_order
from tests.checkpoint.writers import Loop, Ran, qwen2, trained, trainer


def untied(frozen: Callable[[str], bool]) -> Any:
    config = qwen2().config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = type(qwen2())(config)
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(not frozen(name))
    return model


def embeddings(name: str) -> bool:
    return "embed_tokens" in name


def all_but_the_last_block(name: str) -> bool:
    return ".layers.1." not in name


def step_error(ran: Ran, loaded: checkpoint.Checkpoint) -> float:
    _, params = func.make_functional(loaded.model)
    assert set(params) == set(ran.before)
    assert isinstance(loaded.optimizer, fk.precond.AdamWState)
    step = fk.precond.adamw_step(params, {**ran.grads}, loaded.optimizer).total
    taken = torch.cat([(ran.after[name] - ran.before[name]).flatten() for name in params])
    return float((torch.cat([step[name].flatten() for name in params]) - taken).norm() / taken.norm())


def named_as_trainer(ran: Ran) -> list[list[str]]:
    decay = [name for name in ran.before if not name.endswith("bias") and "norm" not in name]
    return [decay, [name for name in ran.before if name not in decay]]


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> Ran:
    with torch.random.fork_rng():
        return trainer(tmp_path_factory.mktemp("run"), lambda: untied(all_but_the_last_block))


def test_shapes_tell_what_was_frozen_where_there_is_one_way(tmp_path):
    """Without the table, the first matrix is a projection: one parameter of that shape can be missing."""
    ran = trainer(tmp_path, lambda: untied(embeddings))
    with pytest.warns(fk.CheckpointWarning, match=r"has 26 of the model's 27 trainable .*model.embed_tokens.weight"):
        loaded = checkpoint.load(ran.path)
    assert step_error(ran, loaded) < 1e-3
    assert [condition.kind for condition in loaded.conditions] == ["frozen"]
    assert not loaded.model.model.embed_tokens.weight.requires_grad


def test_blocks_of_equal_shapes_are_never_chosen_between(block):
    with pytest.raises(fk.OptimizerStateError, match=r"some of the model's parameters frozen, more than one way fits"):
        checkpoint.load(block.path)


def test_names_say_what_was_trained(block):
    loaded = checkpoint.load(block.path, names=named_as_trainer(block))
    assert step_error(block, loaded) < 1e-3
    assert set(trained(loaded.model)) == set(block.before)


def test_a_file_of_names_says_what_was_trained(block):
    import json

    path = block.path / "optimizer_param_names.json"
    path.write_text(json.dumps(named_as_trainer(block)))
    try:
        assert step_error(block, checkpoint.load(block.path)) < 1e-3
    finally:
        path.unlink()


def test_names_of_no_parameter_freeze_nothing(block):
    decay, plain = named_as_trainer(block)
    with pytest.raises(fk.OptimizerStateError, match=r"are named 'model.layers.1.mlp.misspelt', which the"):
        checkpoint.load(block.path, names=[[*decay[:-1], "model.layers.1.mlp.misspelt"], plain])


def test_recorded_names_say_what_was_trained(tmp_path):
    def of_trained(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([(n, leaf) for n, leaf in model.named_parameters() if leaf.requires_grad], lr=1e-3)

    def save(loop: Loop) -> None:
        loop.model.save_pretrained(tmp_path)
        torch.save(loop.optimizer.state_dict(), tmp_path / "optimizer.pt")

    ran = Loop(of_trained, untied(all_but_the_last_block)).run(tmp_path, save)
    assert step_error(ran, checkpoint.load(tmp_path)) < 1e-3


def test_a_second_optimizer_is_not_taken_for_frozen_parameters(tmp_path):
    """Accelerate saves optimizer.bin, optimizer_1.bin: what the first lacks, the second may have."""
    model = untied(lambda name: False)
    model.save_pretrained(tmp_path)
    parts = {"optimizer.bin": embeddings, "optimizer_1.bin": lambda name: not embeddings(name)}
    for file, mine in parts.items():
        optimizer = torch.optim.AdamW([(name, leaf) for name, leaf in model.named_parameters() if mine(name)])
        torch.save(optimizer.state_dict(), Path(tmp_path) / file)
    with pytest.raises(fk.CheckpointError, match=r"several files of optimizers lie there: .*optimizer_1.bin"):
        checkpoint.load(tmp_path)


def net(*shapes: tuple[int, ...]) -> torch.nn.Module:
    model = torch.nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"p{number}", torch.nn.Parameter(torch.zeros(shape)))
    return model


def test_what_may_be_left_out_in_one_way_is():
    model = net((2, 3), (4,), (3, 3), (5,))
    assert find_order([[(2, 3), (3, 3), (5,)]], model) == [["p0", "p2", "p3"]]
    assert find_order([[(2, 3), (3, 3)], []], model) == [["p0", "p2"], []]


@pytest.mark.parametrize(
    "places",
    [
        [[(2, 2)]],  # the first or the second
        [[(2, 2), None]],  # a place that was never stepped may be anyone's
        [[None, None, None]],
    ],
)
def test_what_may_be_left_out_in_two_ways_is_an_error(places):
    with pytest.raises(fk.OptimizerStateError, match="in no known order"):
        find_order(places, net((2, 2), (2, 2), (3, 3), (4,)))


def test_shapes_in_another_order_are_no_subset():
    with pytest.raises(fk.OptimizerStateError, match=r"in no known order .*names=; what is not named is frozen"):
        find_order([[(3, 3), (2, 3)]], net((2, 3), (4, 4), (3, 3)))
