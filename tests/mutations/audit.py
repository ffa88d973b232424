"""Whether a step is the one that was described, and the gradient as the training's own precision has it."""

from tests.mutants import Mutation

AUDIT = "tests/analysis/test_audit.py"
MUTATIONS = [
    Mutation(
        "a fit to the last block of parameters alone",
        f"{AUDIT}::test_it_is_the_least_squares_of_whole_vectors",
        "analysis/step_fit.py", "self.gram += (block @ block.T).cpu()",
        "self.gram = (block @ block.T).cpu()",
    ),
    Mutation(
        "a step that was not clipped after all is not named",
        f"{AUDIT}::test_wrong_descriptions_are_named",
        "analysis/verdicts.py", "if clues.clip < 1 and _near(k * clues.clip, 1, CLIPPED):",
        "if False:",
    ),
    Mutation(
        "the gradient of the last microbatch alone",
        "tests/test_executed.py::test_without_autocast_it_is_the_pullback",
        "engine/executed.py", "total[name] += g",
        "total[name] = g",
    ),
]  # fmt: skip
