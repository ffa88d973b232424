"""What the upper floors promise is broken by one changed line too: a mutated copy of the project must fail its test.

The laws of the engine run inside a mutant (`tests/mutants.py`). Rooms that sample, keep and report are tested as a user
meets them, so that here the test itself is run again, in a process of its own, on a copy whose source is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import Mutation

ROOT = Path(__file__).parent.parent

ROLLOUT, STUDY = "tests/rollout", "tests/study"
AGAIN = "test_a_second_run_computes_no_gradient_and_gives_the_same_bits"
MUTATIONS = [
    Mutation(
        "completions of a prompt share a stream",
        f"{ROLLOUT}/test_generator.py::test_completions_of_a_prompt_are_drawn_apart",
        "rollout/generator.py", "seeds = [seed_of(seed, prefix, g, k) for g, k, _ in draws]",
        "seeds = [seed_of(seed, prefix, g) for g, k, _ in draws]",
    ),
    Mutation(
        "one stream for a whole microbatch",
        f"{ROLLOUT}/test_sampling.py::test_company_changes_nothing",
        "rollout/sampling.py", "[torch.Generator().manual_seed(seed) for seed in seeds]",
        "[torch.Generator().manual_seed(seeds[0])] * len(seeds)",
    ),
    Mutation(
        "the EOS does not belong to its response",
        f"{ROLLOUT}/test_sampling.py::test_eos_ends_a_response_and_belongs_to_it",
        "rollout/sampling.py", "end = length or len(tokens[row])", "end = (length or len(tokens[row]) + 1) - 1",
    ),
    Mutation(
        "log q of the untruncated distribution",
        f"{ROLLOUT}/test_sampling.py::test_teacher_forcing_says_what_the_sampler_saw",
        "rollout/sampling.py", "self.q.append(log_q.gather(1, token)[:, 0])",
        "self.q.append(log_p.gather(1, token)[:, 0])",
    ),
    Mutation(
        "dapo's weights of one micro-batch",
        f"{ROLLOUT}/test_weights.py::test_trl_losses_are_weighted_sums_of_scores",
        "rollout/advantages.py", "return ones * batches / (t.sum() if tokens is None else tokens)",
        "return ones / t.sum()",
    ),
    Mutation(
        "clipping left out of a study's contributions",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says",
        "study/workspace.py", "return self.clip * self.batch.loss_weights\n\n", "return self.batch.loss_weights\n\n",
    ),
    Mutation(
        "columns of the kernel left in the order of their lengths",
        f"{STUDY}/test_runner.py::test_it_is_what_explain_step_says",
        "study/gradients.py", "K[columns[:, None], rows] = part.T", "K[columns[:, None], rows] = part.T.flip(0)",
    ),
    Mutation(
        "a workspace of something else is served",
        f"{STUDY}/test_workspace.py::test_what_differs_is_named",
        "study/directory.py", "if found := differences(stored, wanted):", "if found := []:",
    ),
    Mutation(
        "a damaged response is served",
        f"{STUDY}/test_workspace.py::test_damage_is_never_served",
        "study/directory.py", 'checksum(place) != facts["sha256"]', "False",
    ),
    Mutation(
        "stored gradients are computed again",
        f"{STUDY}/test_runner.py::{AGAIN}",
        "kernel/stored.py", "if not store.has(i)]", "]",
    ),
    Mutation(
        "contributors without their sign",
        f"{STUDY}/test_diagnostics.py::test_top_contributors_are_by_size_and_keep_their_sign",
        "study/diagnostics.py", "return order, C.gather(1, order)", "return order, C.abs().gather(1, order)",
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_changed_line_fails_its_test(mutation, tmp_path):
    for name in ("fkernel", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "fkernel" / mutation.file
    source = file.read_text()
    assert source.count(mutation.old) == 1, f"{mutation.old!r} stands {source.count(mutation.old)} times"
    file.write_text(source.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutation.law]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"FAILED {mutation.law}" in done.stdout, done.stdout[-2000:]  # and not an error in setting it up
