"""What public functions say of arguments that they cannot use."""

from tests.mutants import Mutation

UNANNOTATED = "tests/bad_input/test_boundary.py::test_what_is_refused_where_annotations_are_not_executed"
MUTATIONS = [
    Mutation(
        "what fails beneath a public function is raised as it is",
        UNANNOTATED,
        "boundary.py",
        "        raise ArgumentError(_message(function, args, kwargs, error)) from error",
        "        raise",
    ),
    Mutation(
        "an error of the user's own function is taken for one of arguments",
        UNANNOTATED,
        "boundary.py",
        "        if _is_users(error.__traceback__):\n            raise\n",
        "",
    ),
    Mutation(
        "a full memory is taken for an error of arguments",
        UNANNOTATED,
        "boundary.py",
        "except (FKernelError, torch.OutOfMemoryError):",
        "except FKernelError:",
    ),
    Mutation(
        "the innermost public function speaks, of arguments that are not the user's",
        UNANNOTATED,
        "boundary.py",
        "        if _WITHIN.get():\n            return function(*args, **kwargs)\n",
        "",
    ),
    Mutation(
        "what yields is left without a boundary",
        UNANNOTATED,
        "boundary.py",
        "if inspect.isgeneratorfunction(function):",
        "if False:",
    ),
    Mutation(
        "settings of an optimizer may be infinite",
        UNANNOTATED,
        "precond/base.py",
        "not -LARGEST < value < LARGEST",
        "False",
    ),
]
