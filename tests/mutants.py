"""Load a copy of the package with one line of its source changed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import fkernel

ROOT = Path(fkernel.__file__).parent


@dataclass(frozen=True)
class Mutation:
    """One deliberate mistake: `old` stands exactly once in `file` and becomes `new`; `law` must then fail."""

    name: str
    law: str
    file: str
    old: str
    new: str


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        # Compiled afresh: a mutant must neither read nor write the bytecode cache.
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the whole package before the shape-checking import hook does: its checks compare classes by module name."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "fkernel":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if fullname == self.module:
            assert spec is not None
            assert spec.origin is not None
            spec.loader = _Loader(fullname, spec.origin, self.source)
        return spec


def load(mutation: Mutation) -> ModuleType:
    """Import the mutated package beside the real one; `sys.modules` is left as it was."""
    source = (ROOT / mutation.file).read_text()
    found = source.count(mutation.old)
    assert found == 1, f"{mutation.name}: {mutation.old!r} stands {found} times in {mutation.file}, expected once"
    module = "fkernel." + mutation.file.removesuffix(".py").replace("/", ".")
    finder = _Finder(module, source.replace(mutation.old, mutation.new))
    ours = {name: mod for name, mod in sys.modules.items() if name == "fkernel" or name.startswith("fkernel.")}
    for name in ours:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        package = importlib.import_module("fkernel")
        for name in ("fkernel.engine.by_layer", "fkernel.func.layers.cutting"):  # modules that the root may not need
            importlib.import_module(name)
        return package
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name == "fkernel" or name.startswith("fkernel.")]:
            del sys.modules[name]
        sys.modules.update(ours)


MUTATIONS = [
    Mutation(
        "sum taken as mean", "gradients_equal_a_loop_of_autograd",
        "func/logprob.py", "params, batch).sum(1)", "params, batch).mean(1)",
    ),
    Mutation(
        "weights of another microbatch", "gradients_equal_a_loop_of_autograd",
        "func/inputs/microbatch.py", "weights[rows])", "weights[: rows.stop - rows.start])",
    ),
    Mutation(
        "parameter skipped", "gradients_equal_a_loop_of_autograd",
        "func/functional.py", "{name: named[name].detach() for name in chosen}",
        "{name: named[name].detach() for name in chosen[1:]}",
    ),
    Mutation(
        "one use of a tied table overwrites the other", "gradients_equal_a_loop_of_autograd",
        "func/handles/forms.py", "for part in parts[1:]:", "for part in parts[2:]:",
    ),
    Mutation(
        "uses beside the known layers dropped", "gradients_equal_a_loop_of_autograd",
        "func/taps/listening.py", "        self.uses.extend(taps)", "        self.uses.extend(taps[:1])",
    ),
    Mutation(
        "GPT-2's tokens in another order", "gradients_equal_a_loop_of_autograd",
        "func/taps/listening.py", "(several and self.turned) else (a, δ)",
        "(several and self.turned) else (a.flip(1), δ)",
    ),
    Mutation(
        "gathered rows dealt out in turn", "rows_find_their_sequence_wherever_they_went",
        "func/taps/whose.py", "[ids % len(x) // (len(x) // self.n)]", "[ids % self.n]",
    ),
    Mutation(
        "gathered rows in another order", "rows_find_their_sequence_wherever_they_went",
        "func/taps/whose.py", "out[mine, place] = x[order]", "out[mine, place] = x[order.flip(0)]",
    ),
    Mutation(
        "an expert's rows beside another token's", "rows_find_their_sequence_wherever_they_went",
        "func/handles/touched.py", "rights = touch.right[moved][order].split(each)",
        "rights = touch.right[moved][order.flip(0)].split(each)",
    ),
    Mutation(
        "another expert's row", "rows_find_their_sequence_wherever_they_went",
        "func/handles/touched.py", "ids[key // size, k] = key % size", "ids[key // size, k] = (key + 1) % size",
    ),
    Mutation(
        "what is computed of a parameter taken for it", "rows_find_their_sequence_wherever_they_went",
        "func/taps/made.py", "if func in _CASTS and out.shape == one.value.shape:", "if out.shape == one.value.shape:",
    ),
    Mutation(
        "a transposed matrix taken for itself", "rows_find_their_sequence_wherever_they_went",
        "func/taps/made.py", "return one._replace(value=out, turned=not one.turned)", "return one._replace(value=out)",
    ),
    Mutation(
        "an expanded parameter's rows not summed", "rows_find_their_sequence_wherever_they_went",
        "func/taps/listening.py", "δ.sum_to_size(self.n, *repeated, *self.size)",
        "δ[:, :1].sum_to_size(self.n, *repeated, *self.size)",
    ),
    Mutation(
        "fused layer norm under nested jvp", "derivatives_agree_with_central_differences",
        "func/trust/directional.py", "    with elementary():", "    if elementary:",
    ),
    Mutation(
        "value in place of derivative", "derivatives_agree_with_central_differences",
        "func/trust/directional.py", "return value, tangent", "return value, value",
    ),
    Mutation(
        "sign of the weights lost", "derivatives_agree_with_central_differences",
        "func/gradient.py", "pull(weights.to(value.dtype))", "pull(weights.abs().to(value.dtype))",
    ),
    Mutation(
        "influence without P", "influence_equals_kernel_times_weights",
        "engine/fisher.py", "move = transformed(P, towards)", "move = towards",
    ),
    Mutation(
        "an influence left in the engine's order", "influence_equals_kernel_times_weights",
        "engine/sums.py", "total.index_copy_(0, side.order.to(like.device), ", "total.copy_(",
    ),
    Mutation(
        "cotangents along a direction with other tokens' inputs", "influence_equals_kernel_times_weights",
        "func/trust/directional.py", "(inputs @ v.to(inputs).mT)", "(inputs.flip(1) @ v.to(inputs).mT)",
    ),
    Mutation(
        "lookups along a direction by another token", "influence_equals_kernel_times_weights",
        "func/trust/directional.py", "v.to(cotangents)[ids]", "v.to(cotangents)[ids.flip(1)]",
    ),
    Mutation(
        "incomplete last shard dropped", "influence_equals_kernel_times_weights",
        "tree.py", "for start in range(0, left.shape[1], columns)",
        "for start in range(0, left.shape[1] - columns + 1, columns)",
    ),
    Mutation(
        "one side's sign lost", "self_kernel_is_symmetric_and_positive_semidefinite",
        "func/handles/products.py", "return (scaled, other) if small is left",
        "return (scaled.abs(), other) if small is left",
    ),
    Mutation(
        "padding scored", "company_changes_nothing",
        "func/logprob.py", "batch.response_mask[:, 1:].bool()",
        "(batch.response_mask | ~batch.attention_mask.bool())[:, 1:].bool()",
    ),
    Mutation(
        "microbatch written in reverse", "company_changes_nothing",
        "func/inputs/microbatch.py", "torch.cat(column)[back]", "torch.cat(column).flip(0)[back]",
    ),
    Mutation(
        "sorted rows left sorted", "influence_equals_kernel_times_weights",
        "engine/fisher.py", "K[block.at] = block.kernel()", "K[:] = block.kernel()",
    ),
    Mutation(
        "gradients of sorted microbatches left sorted", "gradients_equal_a_loop_of_autograd",
        "func/inputs/microbatch.py", "yield rows if as_it_came else order[rows],", "yield rows,",
    ),
    Mutation(
        "one token too many cut off", "company_changes_nothing",
        "func/inputs/batch.py", "width = int(node.attention_mask.long().sum(1).max())",
        "width = int(node.attention_mask.long().sum(1).max()) - 1",
    ),
    Mutation(
        "left-pad attended", "left_padding_is_refused",
        "func/inputs/batch.py", "(attended[:, 1:] & ~attended[:, :-1]).any(1) | ~attended[:, 0]", "(~attended).all(1)",
    ),
    Mutation(
        "advantages normalised", "effects_are_linear_in_the_advantages",
        "engine/sums.py", "(params, U, weights)", "(params, U, weights / weights.norm())",
    ),
    Mutation(
        "missing bias correction of m", "three_terms_are_the_step_that_torch_takes",
        "precond/adaptive.py", "return state.lr[name] / (1 - state.beta1[name] ** (state.step[name] + 1))",
        "return state.lr[name]",
    ),
    Mutation(
        "bias correction of the step before", "three_terms_are_the_step_that_torch_takes",
        "precond/adaptive.py", "+ (1 - beta2) * g * g, t + 1", "+ (1 - beta2) * g * g, max(t, 1)",
    ),
    Mutation(
        "ε inside the root", "three_terms_are_the_step_that_torch_takes",
        "precond/adaptive.py", "v_hat.sqrt() + state.eps[name]", "(v_hat + state.eps[name]).sqrt()",
    ),
    Mutation(
        "wrong sign of decay", "three_terms_are_the_step_that_torch_takes",
        "precond/adaptive.py", "-state.lr[name] * state.weight_decay[name] * theta",
        "state.lr[name] * state.weight_decay[name] * theta",
    ),
    Mutation(
        "stored v in place of v'", "three_terms_are_the_step_that_torch_takes",
        "precond/adaptive.py", "beta2 * v + (1 - beta2) * g * g, t + 1", "v, t + 1",
    ),
    Mutation(
        "decay without gradient", "three_terms_are_the_step_that_torch_takes",
        "precond/adaptive.py", "(torch.zeros_like(theta) for _ in range(3))",
        "(torch.zeros_like(theta), torch.zeros_like(theta), -0.01 * theta)",
    ),
    Mutation(
        "clipping left out of C", "contributions_momentum_and_decay_are_the_jvp_of_the_step",
        "engine/step.py", "clip * weights.to(K)", "weights.to(K)",
    ),
    Mutation(
        "P_step without lr", "contributions_momentum_and_decay_are_the_jvp_of_the_step",
        "precond/adaptive.py", "{name: _rate(state, name) * (1 - state.beta1[name]) for name",
        "{name: (1 - state.beta1[name]) for name",
    ),
    Mutation(
        "loss taken as gain", "contributions_add_up_to_the_change_that_happened",
        "engine/step.py", "None, widened(weights.to(", "None, -widened(weights.to(",
    ),
    Mutation(
        "clipping ignored", "contributions_add_up_to_the_change_that_happened",
        "precond/clipping.py", "return min(1.0, max_norm / (float(tree.norm(grads)) + 1e-6))", "return 1.0",
    ),
    Mutation(
        "E's gradients at the end of the step", "contributions_add_up_to_the_change_that_happened",
        "engine/path.py", '"midpoint": ((1.0, 0.5),)', '"midpoint": ((1.0, 1.0),)',
    ),
    Mutation(
        "E's gradients where the step begins", "contributions_add_up_to_the_change_that_happened",
        "engine/step.py", "spec, path, total, kept,", "spec, 'start', total, kept,",
    ),
    Mutation(
        "two nodes at the ends", "contributions_add_up_to_the_change_that_happened",
        "engine/path.py", "_APART = 3**0.5 / 6", "_APART = 0.5",
    ),
    Mutation(
        "nodes added up without their weights", "contributions_momentum_and_decay_are_the_jvp_of_the_step",
        "engine/path.py", "part._replace(cotangents=q * part.cotangents)", "part",
    ),
    Mutation(
        "decay counted as momentum", "contributions_momentum_and_decay_are_the_jvp_of_the_step",
        "engine/step.py", 'torch.stack([block.rows("momentum"), block.rows("decay")])',
        'torch.stack([block.rows("decay"), block.rows("momentum")])',
    ),
    Mutation(
        "P on both sides", "preconditioner_stands_on_one_side",
        "engine/fisher.py", 'ProductSpec({"": D})', 'ProductSpec({"": {k: v * v for k, v in D.items()}})',
    ),
    Mutation(
        "rows and columns swapped", "preconditioner_stands_on_one_side",
        "engine/streaming.py", "K[columns].T.contiguous()", "K[columns].reshape(K.shape[::-1])",
    ),
    Mutation(
        "shifted mask", "scores_are_tempered_sums_over_the_response",
        "func/logprob.py", "batch.response_mask[:, 1:].bool()", "batch.response_mask[:, :-1].bool()",
    ),
    Mutation(
        "EOS dropped", "scores_are_tempered_sums_over_the_response",
        "func/inputs/batch.py", "response_mask[row, len(prompt) : end] = True",
        "response_mask[row, len(prompt) : max(end - 1, len(prompt) + 1)] = True",
    ),
    Mutation(
        "temperature multiplied", "scores_are_tempered_sums_over_the_response",
        "func/logprob.py", "torch.float32)) / temperature", "torch.float32)) * temperature",
    ),
    Mutation(
        "sign of the entropy", "scores_are_tempered_sums_over_the_response",
        "func/logprob.py", "-(log_p.exp() * finite).sum(-1)", "(log_p.exp() * finite).sum(-1)",
    ),
    Mutation(
        "frozen form without bias correction", "frozen_and_post_step_agree_as_beta2_nears_one",
        "precond/adaptive.py", "return v / (1 - beta2**t)\n    if g is not None", "return v\n    if g is not None",
    ),
    Mutation(
        "a tile's rows written over by the next one's", "every_strategy_gives_the_same_kernel",
        "engine/gradients.py", "return slice(self.cuts[block[0]].start, self.cuts[block[-1]].stop)",
        "return slice(0, self.cuts[block[-1]].stop - self.cuts[block[0]].start)",
    ),
    Mutation(
        "only the last share of the parameters counts", "every_strategy_gives_the_same_kernel",
        "func/handles/products.py", "K += self._shard(", "K[:] = self._shard(",
    ),
    Mutation(
        "a share of the parameters left out", "every_strategy_gives_the_same_kernel",
        "engine/streaming.py", "for names in shares:\n", "for names in shares[1:] or shares:\n",
    ),
    Mutation(
        "factors read back in another order", "every_strategy_gives_the_same_kernel",
        "engine/store/shards.py", "return Factored(*(_tensor(part, tensors) for part in parts))",
        "return Factored(*(_tensor(part, tensors).flip(2) for part in parts))",
    ),
    Mutation(
        "an error counted a thousandfold too small", "rounding_stays_within_its_bound",
        "engine/low_precision.py", "SLACK * ε @", "1e-3 * SLACK * ε @",
    ),
    Mutation(
        "the error of what was not rounded", "rounding_stays_within_its_bound",
        "engine/low_precision.py", "errors.append(shard_norms(exact, d, less=kept[-1]))",
        "errors.append(shard_norms(exact, d, less=exact))",
    ),
    Mutation(
        "weights of held factors lose their sign", "held_gradients_give_what_passes_give",
        "func/handles/reductions.py", "w[:, None, None]).flatten(0, 1).mT", "w.abs()[:, None, None]).flatten(0, 1).mT",
    ),
    Mutation(
        "a later part of a tied table counted once more", "held_gradients_give_what_passes_give",
        "func/handles/reductions.py", "total += vector", "total += 2 * vector",
    ),
    Mutation(
        "only the last tile's norm", "held_gradients_give_what_passes_give",
        "func/handles/products.py", "            total += sums\n", "            total[:] = sums\n",
    ),
    Mutation(
        "post-step form without v", "frozen_and_post_step_agree_as_beta2_nears_one",
        "precond/adaptive.py", "v, t = beta2 * v + (1 - beta2) * g * g, t + 1", "v, t = g * g, t + 1",
    ),
    Mutation(
        "a tied table counted once", "layers_give_what_the_whole_gives",
        "func/layers/walk.py", "uses.insert(0, heads[k])", "assert heads",
    ),
    Mutation(
        "an online sum that is not rescaled", "layers_give_what_the_whole_gives",
        "func/handles/head.py", "mean.mul_(shrunk[:, None]), p,", "mean, p,",
    ),
    Mutation(
        "a target's own logit left out of the table's gradient", "layers_give_what_the_whole_gives",
        "func/handles/head.py", "] - start] += slope[n, s]", "] - start] += 0 * slope[n, s]",
    ),
    Mutation(
        "a node's weight dropped", "layers_give_what_the_whole_gives",
        "engine/by_layer.py", "weight=q", "weight=1.0",
    ),
    Mutation(
        "the last node only", "layers_give_what_the_whole_gives",
        "engine/by_layer.py", "(add if j else materialize_into)(", "materialize_into(",
    ),
    Mutation(
        "a path that stays where it begins", "layers_give_what_the_whole_gives",
        "func/inputs/source.py", "else widened(θ) + s * widened(δ)", "else widened(θ) + 0 * s * widened(δ)",
    ),
    Mutation(
        "the input of the layer before", "layers_give_what_the_whole_gives",
        "func/layers/walk.py", "block.kept[i + 1] = layer(self.cut, i, leaves, h, block.calls[i])",
        "block.kept[i + 1] = h if i % 2 else layer(self.cut, i, leaves, h, block.calls[i])",
    ),
]  # fmt: skip
