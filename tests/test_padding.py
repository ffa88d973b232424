"""A padding token inside of a sequence: U's gradient is the trainer's, E's is the derivative."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fkernel as fk
from fkernel import func

PAD = 0
pytestmark = pytest.mark.filterwarnings("ignore:.*padding id")  # that is what this is about


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=request.param, pad_token_id=PAD,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    found = Qwen2ForCausalLM(config).double().train()
    found.set_attn_implementation("eager")  # its softmax is in float32 whatever the model is, as the engine's
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found


SEQUENCES = ([[3, 4], [PAD, 5, 6], [7]], [[5, PAD, 6], [8, 9], [PAD, PAD, 2, 1]])
WEIGHTS = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def trainers(model, weights=WEIGHTS):
    """∇ Σ w S by backward(), as a trainer takes it."""
    model.zero_grad()
    for prompt, response, w in zip(*SEQUENCES, weights, strict=True):
        logp = model(torch.tensor([[*prompt, *response]])).logits[0, :-1].log_softmax(-1)
        own = logp[range(len(logp)), [*prompt[1:], *response]][len(prompt) - 1 :]
        (w * own.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def engine(model):
    apply, params = func.make_functional(model)
    return (
        func.sequence_logprob(apply),
        func.sequence_logprob(func.with_masked_padding_grad(apply)),
        params,
        func.pad(*SEQUENCES, PAD),
    )


def close(actual, expected):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


def test_the_loss_gradient_is_the_trainers(model):
    _, f, params, U = engine(model)
    close(func.vjp(f)(params, U, WEIGHTS), trainers(model))


def test_so_are_per_sequence_gradients_in_every_form(model):
    _, f, params, U = engine(model)
    J, handles = func.per_sequence_grad(f)(params, U), func.per_sequence_handles(f, 2)(params, U)
    for u in range(3):
        alone = trainers(model, torch.eye(3, dtype=torch.float64)[u])
        close({name: leaf[u] for name, leaf in J.items()}, alone)
        close(func.weighted_sum(handles, torch.eye(3, dtype=torch.float64)[u]), alone)
    assert not any(isinstance(handle, torch.Tensor) and handle.ndim > 2 for handle in handles.values())  # none is dense


def test_values_are_the_same_and_the_derivative_is_another(model):
    true, f, params, U = engine(model)
    torch.testing.assert_close(func.evaluate(true)(params, U), func.evaluate(f)(params, U), rtol=0, atol=0)
    derivative = func.vjp(true)(params, U, WEIGHTS)
    name = "model.embed_tokens.weight"
    withheld = func.vjp(f)(params, U, WEIGHTS)
    assert (derivative[name][PAD] - withheld[name][PAD]).abs().max() > 1e-3
    torch.testing.assert_close(derivative[name][PAD + 1 :], withheld[name][PAD + 1 :], rtol=1e-10, atol=1e-12)


def test_without_padding_inside_nothing_changes(model):
    true, f, params, _ = engine(model)
    U = func.pad([[3, 4], [5]], [[6, 1], [7, 8, 1]], PAD)
    one, other = (func.vjp(each)(params, U, WEIGHTS[:2]) for each in (true, f))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_step_on_such_a_batch_is_predicted(model):
    """U's gradient is the trainer's, E's the derivative: the step that torch takes, met."""
    true, f, params, U = engine(model)
    E = func.pad([[2, 3], [PAD, 4]], [[5, 6], [7, PAD, 8]], PAD)
    state = fk.precond.adamw_init(params, lr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = func.evaluate(true)(params, E)
    gradients = [func.vjp(each)(params, U, -WEIGHTS) for each in (f, true)]
    steps = [fk.precond.adamw_step(params, {**g}, state).total for g in gradients]
    predicted = [func.jvp(true)(params, E, v) + 0.5 * func.curvature(true)(params, E, v) for v in steps]
    for name, gradient in trainers(model, -WEIGHTS).items():
        dict(model.named_parameters())[name].grad = gradient
    optimizer.step()
    realised = func.evaluate(true)(func.make_functional(model)[1], E) - before
    errors = [float((each - realised).norm() / realised.norm()) for each in predicted]
    assert errors[0] < 1e-3
    assert errors[1] > 0.01


def test_a_model_without_a_padding_row_is_left_alone():
    module = torch.nn.Linear(2, 2)
    apply = func.Apply(module, None, None)
    assert func.with_masked_padding_grad(apply) is apply
