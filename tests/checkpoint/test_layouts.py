"""Every layout, written by its real writer, loads into the state that reproduces the writer's own next step."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import fkernel as fk
from fkernel import checkpoint, func
from fkernel.checkpoint.formats import find_layout
from fkernel.checkpoint.optimizer import names_of
from fkernel.checkpoint.order import find_order
from tests.checkpoint.writers import TOKENIZER, WRITERS, Loop, Ran, gpt2, named, nameless, qwen2, trained

WITHOUT_ARCHITECTURE = ("file", "accelerate", "distributed")


@pytest.fixture(scope="module", params=WRITERS)
def ran(request, tmp_path_factory) -> Ran:
    with torch.random.fork_rng():
        return WRITERS[request.param](tmp_path_factory.mktemp("run"))


def loaded(ran: Ran, **options) -> checkpoint.Checkpoint:
    needs = find_layout(ran.path).needs_model
    return checkpoint.load(ran.path, **({"model": ran.model} if needs else {}), **options)


def test_the_state_reproduces_the_writers_next_step(ran):
    found = loaded(ran)
    assert isinstance(found.optimizer, fk.precond.AdamWState)
    assert found.step == 2
    _, params = func.make_functional(found.model)
    assert set(params) == set(ran.before)
    for name, leaf in params.items():
        torch.testing.assert_close(leaf, ran.before[name], rtol=0, atol=0)
    step = fk.precond.adamw_step(params, ran.grads, found.optimizer)
    for name, moved in step.total.items():
        taken = ran.after[name] - ran.before[name]
        torch.testing.assert_close(moved, taken, rtol=1e-4, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(leaf.abs().max()) for leaf in step.total.values()) > 1e-4


def test_a_loaded_checkpoint_can_be_explained(ran):
    found = loaded(ran)
    apply, params = func.make_functional(found.model)
    batch = func.pad([[2, 3], [4, 5, 6]], [[7, 1], [8, 9, 1]])
    weights, state = torch.tensor([1.0, -1.0]), found.optimizer
    assert isinstance(state, fk.precond.AdamWState)
    effect, _ = fk.explain_step(func.sequence_logprob(apply), params, batch, batch, weights, state)
    assert effect.predicted.isfinite().all()


def test_what_libraries_say_to_each_other_does_not_reach_the_user(ran):
    """PEFT reads a property that transformers deprecates: nobody who loads a checkpoint can mend it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded(ran)
    told = [one for one in seen if not issubclass(one.category, fk.CheckpointWarning)]
    assert [str(one.message) for one in told] == []


def test_deprecations_of_the_callers_own_stay(monkeypatch):
    from transformers import AutoModelForCausalLM

    from fkernel.checkpoint import model

    def loads(*given, **more):
        warnings.warn_explicit("old", FutureWarning, "peft/model.py", 1, module="peft.peft_model")
        warnings.warn_explicit("a name that is mine", FutureWarning, "mine.py", 1, module="my_package.models")
        warnings.warn_explicit("something else", UserWarning, "peft/model.py", 1, module="peft.peft_model")
        raise OSError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(fk.ModelError):
            model.load_model("hub:a/b")
    assert [str(one.message) for one in seen] == ["a name that is mine", "something else"]


def test_the_fingerprint_is_of_the_contents(ran):
    first, again = loaded(ran), loaded(ran)
    assert first.provenance.fingerprint == again.provenance.fingerprint
    wide = loaded(ran, dtype=torch.float64)
    assert wide.provenance.fingerprint != first.provenance.fingerprint


def test_the_callers_model_is_not_touched(ran):
    before = trained(ran.model)
    loaded(ran)
    assert all(torch.equal(leaf, before[name]) for name, leaf in trained(ran.model).items())
    assert not any(leaf.dtype == torch.float64 for leaf in trained(ran.model).values())


def test_tokenizer_comes_along(tmp_path):
    run = WRITERS["nested"](tmp_path)
    found = checkpoint.load(run.path)
    assert found.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    shutil.rmtree(run.path / "model")
    qwen2().save_pretrained(run.path / "model")
    assert checkpoint.load(run.path).tokenizer is None


def test_architecture_from_a_directory(tmp_path):
    run = WRITERS["file"](tmp_path)
    run.model.config.save_pretrained(tmp_path / "shape")
    found = checkpoint.load(run.path, model=tmp_path / "shape")
    assert found.optimizer is not None
    assert all(torch.equal(leaf, run.before[name]) for name, leaf in trained(found.model).items())


@pytest.mark.parametrize("writer", WITHOUT_ARCHITECTURE)
def test_weights_without_an_architecture_want_a_model(tmp_path, writer):
    run = WRITERS[writer](tmp_path)
    with pytest.raises(fk.ModelError, match=r"says nothing about the architecture .* give model="):
        checkpoint.load(run.path)
    with pytest.raises(fk.ModelError, match=r"(lacks|has foreign) \d+ of the model's parameters"):
        checkpoint.load(run.path, model=gpt2())


def test_weights_of_another_width_are_refused(tmp_path):
    run = WRITERS["file"](tmp_path)
    found = torch.load(run.path)
    name = next(iter(found["model"]))
    found["model"][name] = found["model"][name][:-1]
    torch.save(found, run.path)
    with pytest.raises(fk.ModelError, match=r"of shape .*, the model's is .*of another model"):
        checkpoint.load(run.path, model=run.model)


def test_missing_weights_are_never_random(tmp_path):
    """from_pretrained would fill what is missing and go on."""
    from safetensors.torch import load_file, save_file

    qwen2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fk.ModelError, match=r"lacks 1 parameter\(s\), such as 'model.layers.1.mlp.up_proj.weight'"):
        checkpoint.load(tmp_path)


def test_adapter_whose_base_is_elsewhere(tmp_path):
    run = WRITERS["grpo, lora"](tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(fk.ModelError, match=r"records its base model as .*no directory here; say where it is: base="):
        checkpoint.load(run.path)
    found = checkpoint.load(run.path, base=tmp_path / "moved")
    assert found.provenance.base == str(tmp_path / "moved")
    assert found.provenance.layout == "adapter"
    assert found.tokenizer is not None


def test_scheduler_of_another_step_is_seen(tmp_path):
    run = WRITERS["trainer"](tmp_path)
    scheduler = torch.load(run.path / "scheduler.pt")
    scheduler["_last_lr"] = [5e-5, 5e-5]
    torch.save(scheduler, run.path / "scheduler.pt")
    with pytest.raises(fk.OptimizerStateError, match=r"its scheduler at .* has set \[5e-05, 5e-05\]"):
        checkpoint.load(run.path)


def test_directories_that_are_none(tmp_path):
    with pytest.raises(fk.CheckpointError, match="There is no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(fk.CheckpointError, match=r"is no checkpoint that is recognised: it holds \[\]"):
        checkpoint.load(tmp_path)
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(fk.CheckpointError, match=r"holds 2 checkpoints, .*checkpoint-10"):
        checkpoint.load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").rmdir()
    with pytest.raises(fk.CheckpointError, match=r"weights as pytorch_model.bin"):
        checkpoint.load(tmp_path)


class Payload:
    """What a hostile file would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_in_a_file_is_executed(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"model": {}, "optimizer": Payload()}, path)
    with pytest.raises(fk.CheckpointError, match="nothing that a file contains is executed"):
        checkpoint.load(path, model=qwen2())


@pytest.mark.parametrize("hostile", ["class", "method", "module"])
def test_nothing_in_distributed_metadata_is_executed(tmp_path, hostile):
    run = WRITERS["distributed"](tmp_path / "run")
    (tmp_path / "victim").touch()
    stream = {
        "class": pickle.dumps(Payload()),
        # Dotted names reach methods of classes that are allowed: pathlib.PosixPath.unlink
        "method": b"\x80\x04\x8c\x07pathlib\x8c\x10PosixPath.unlink\x93\x8c\x07pathlib\x8c\x09PosixPath\x93"
        + b"\x8c"
        + bytes([len(str(tmp_path / "victim"))])
        + str(tmp_path / "victim").encode()
        + b"\x85R\x85R.",
        "module": b"ctorch.distributed.checkpoint.filesystem\nos\n.",
    }[hostile]
    (run.path / ".metadata").write_bytes(stream)
    with pytest.raises(fk.CheckpointError, match="which no checkpoint's metadata is made of; refused"):
        checkpoint.load(run.path, model=run.model)
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("damage", ["metadata cut", "shard cut", "shard missing"])
def test_damaged_distributed_checkpoints_are_refused(tmp_path, damage):
    run = WRITERS["distributed"](tmp_path)
    file = run.path / ".metadata" if "metadata" in damage else next(run.path.glob("*.distcp"))
    if "cut" in damage:
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    with pytest.raises(fk.CheckpointError, match=r"cannot be read|damaged"):
        checkpoint.load(run.path, model=run.model)


def odd_one() -> torch.nn.Module:
    """A matrix that is called a norm, and a vector that is not: two rules put them into two orders of equal sizes."""
    net = torch.nn.Module()
    net.first_norm, net.second = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    return net


def test_two_orders_that_fit_are_never_chosen_between():
    """Before the first step there are no moments whose shapes could tell, and yet a rate and a decay each."""
    net = odd_one()
    groups = [{"params": [net.second], "weight_decay": 0.1}, {"params": [net.first_norm], "weight_decay": 0.0}]
    state_dict = torch.optim.AdamW(groups, lr=0.1).state_dict()
    with pytest.raises(
        fk.OptimizerStateError,
        match=r"more than one known order of them fits every shape: trainer, by_dimension. .*order='trainer'.*names=",
    ):
        checkpoint.adamw_state(state_dict, trained(net), model=net)
    said = checkpoint.adamw_state(state_dict, trained(net), model=net, order="trainer")
    assert said.weight_decay == {"first_norm": 0.0, "second": 0.1}
    other = checkpoint.adamw_state(state_dict, trained(net), model=net, order="by_dimension")
    assert other.weight_decay == {"first_norm": 0.1, "second": 0.0}


def test_shapes_of_moments_tell_orders_apart():
    net = odd_one()
    assert find_order([[(3,)], [(3, 3)]], net) == checkpoint.ORDERS["trainer"](net)
    assert find_order([[(3, 3)], [(3,)]], net) == checkpoint.ORDERS["by_dimension"](net)
    with pytest.raises(fk.OptimizerStateError, match=r"by_dimension: 'first_norm' is \[3, 3\], .* place \[3\]"):
        find_order([[(3,)], [(3, 3)]], net, order="by_dimension")


def test_an_empty_group_may_or_may_not_have_been_kept():
    net = torch.nn.Linear(3, 2, bias=False)
    assert find_order([[(2, 3)], []], net) == [["weight"], []]
    assert find_order([[(2, 3)]], net) == [["weight"]]


def test_shapes_and_sizes_decide_and_are_told():
    net = gpt2()
    optimizer = nameless(net)
    state_dict = Loop(nameless, net).optimizer.state_dict()
    assert names_of(state_dict, trained(net), net) == [[n for n, _ in net.named_parameters()]]
    with pytest.raises(fk.OptimizerStateError, match=r"records no param_names.*names=\), or the model \(model=\)"):
        checkpoint.adamw_state(optimizer.state_dict(), trained(net))
    optimizer.param_groups[0]["params"].reverse()
    loop = Loop(lambda model: torch.optim.AdamW([*model.parameters()][::-1], lr=0.1), net)
    loop.step(0)
    with pytest.raises(fk.OptimizerStateError, match=r"in no known order .*named_parameters: '.*' is \[.*names="):
        checkpoint.adamw_state(loop.optimizer.state_dict(), trained(net), model=net)
    with pytest.raises(fk.OptimizerStateError, match="order is 'mine'; the known ones are named_parameters"):
        checkpoint.adamw_state(loop.optimizer.state_dict(), trained(net), model=net, order="mine")


@pytest.mark.parametrize("form", ["list", "groups", "numbers"])
def test_names_may_be_given(form):
    loop = Loop(lambda model: torch.optim.AdamW([*model.parameters()][::-1], lr=0.1))
    loop.step(0)
    names = [name for name, _ in loop.model.named_parameters()][::-1]
    given = {"list": names, "groups": [names], "numbers": {str(i): name for i, name in enumerate(names)}}[form]
    state = checkpoint.adamw_state(
        loop.optimizer.state_dict(), trained(loop.model), names=json.loads(json.dumps(given))
    )
    for name, leaf in loop.model.named_parameters():
        assert torch.equal(state.exp_avg[name], loop.optimizer.state[leaf]["exp_avg"])


def test_given_names_must_be_as_many_and_true():
    loop = Loop(nameless)
    loop.step(0)
    names, params = [name for name, _ in loop.model.named_parameters()], trained(loop.model)
    state_dict = loop.optimizer.state_dict()
    with pytest.raises(fk.OptimizerStateError, match=rf"{len(names) - 1} names were given for the {len(names)}"):
        checkpoint.adamw_state(state_dict, params, names=names[1:])
    with pytest.raises(fk.OptimizerStateError, match=r"groups of .* the optimizer's groups are"):
        checkpoint.adamw_state(state_dict, params, names=[names[:3], names[3:]])
    with pytest.raises(fk.OptimizerStateError, match="lack number '0'"):
        checkpoint.adamw_state(state_dict, params, names={"1": "x"})
    with pytest.raises(fk.OptimizerStateError, match="twice"):
        checkpoint.adamw_state(state_dict, params, names=[names[0], *names[:-1]])
    recorded = Loop(named, loop.model)
    with pytest.raises(fk.OptimizerStateError, match="are not those that were given; give none"):
        checkpoint.adamw_state(recorded.optimizer.state_dict(), params, names=names[::-1])


def test_a_frozen_parameter_in_the_optimizer_shifts_nobody():
    model = qwen2()
    model.model.embed_tokens.weight.requires_grad_(False)
    loop = Loop(nameless, model)  # over all parameters, the frozen table first
    loop.step(0)
    state = checkpoint.adamw_state(loop.optimizer.state_dict(), trained(model), model=model)
    assert "model.embed_tokens.weight" not in state.names
    for name, leaf in model.named_parameters():
        if leaf.requires_grad:
            assert torch.equal(state.exp_avg[name], loop.optimizer.state[leaf]["exp_avg"])


FOREIGN = {
    "adafactor": ({"step": 1, "exp_avg_sq_row": torch.zeros(4)}, "which transformers_adafactor keeps and adamw"),
    "sgd": ({"momentum_buffer": torch.zeros(4)}, "which sgd and rmsprop and muon keeps and adamw"),
    "lion": ({"exp_avg": torch.zeros(1, 2)}, "but no exp_avg_sq"),
    "one moment": ({"step": 1, "state1": torch.zeros(1, 2)}, "a bitsandbytes optimizer with one moment"),
    "lamb": (
        {"step": 1, "state1": torch.zeros(1, 2), "state2": torch.zeros(1, 2), "unorm_vec": torch.zeros(1)},
        "scales a step by layers",
    ),
    "unheard of": (
        {"step": 1, "exp_avg": torch.zeros(1, 2), "exp_avg_sq": torch.zeros(1, 2), "curl": torch.zeros(1)},
        "has 'curl', which no known optimizer keeps and adamw",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_states_of_other_optimizers_say_whose_they_are(kind):
    net = torch.nn.Linear(2, 1, bias=False)
    state_dict = torch.optim.AdamW(net.named_parameters()).state_dict()
    state_dict["state"] = {0: FOREIGN[kind][0]}
    with pytest.raises(fk.OptimizerStateError, match=FOREIGN[kind][1]):
        checkpoint.adamw_state(state_dict, trained(net))


def test_decay_of_an_unknown_kind_is_asked_for():
    net = torch.nn.Linear(2, 1)
    state_dict = torch.optim.AdamW(net.named_parameters(), weight_decay=0.1).state_dict()
    del state_dict["param_groups"][0]["decoupled_weight_decay"]  # as torch before 2.7 wrote it
    with pytest.raises(fk.OptimizerStateError, match="Say decoupled=True if the training used AdamW"):
        checkpoint.adamw_state(state_dict, trained(net))
    assert checkpoint.adamw_state(state_dict, trained(net), decoupled=True).weight_decay["weight"] == 0.1
    state_dict["param_groups"][0]["correct_bias"] = True
    with pytest.raises(fk.OptimizerStateError, match="transformers' old AdamW, apex"):
        checkpoint.adamw_state(state_dict, trained(net), decoupled=True)


def test_path_may_be_text(tmp_path: Path):
    qwen2().save_pretrained(tmp_path)
    found = checkpoint.load(str(tmp_path))
    assert found.optimizer is None
    assert found.step is None
    assert found.provenance.layout == "huggingface"


def test_tied_weights_that_differ_are_two(tmp_path):
    """An untied model's weights in an architecture whose head is its table."""
    weights = {name: leaf.clone() for name, leaf in qwen2().state_dict().items()}
    torch.save({"model": weights}, tmp_path / "same.pt")
    assert checkpoint.load(tmp_path / "same.pt", model=qwen2()).optimizer is None
    weights["lm_head.weight"][0, 0] += 1
    torch.save({"model": weights}, tmp_path / "other.pt")
    with pytest.raises(fk.ModelError, match=r"two different weights .*embed_tokens.weight' and 'lm_head.weight'"):
        checkpoint.load(tmp_path / "other.pt", model=qwen2())


def test_the_model_that_is_given_is_not_emptied(tmp_path):
    """Names and shapes are taken of a copy."""
    run, given = WRITERS["file"](tmp_path), qwen2(seed=5)
    before = trained(given)
    loaded = checkpoint.load(run.path, model=given)
    assert all(torch.equal(leaf, before[name]) for name, leaf in trained(given).items())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight  # tied, as it was
    assert all(leaf.is_contiguous() for leaf in loaded.model.parameters())
