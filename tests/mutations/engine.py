"""The engine by layers, influence, changes of long responses; files that are replaced."""

from tests.mutants import Mutation

LAYERED = "tests/test_layered.py"
CHANGE = "tests/test_realised_change.py"
TILED = f"{LAYERED}::test_tiles_of_either_side_along_any_path_give_what_whole_sequences_give"
MUTATIONS = [
    Mutation(
        "every tile holds the first sequences",
        f"{TILED}[E-midpoint]",
        "engine/layerwise.py",
        "side._replace(batch=trim(take(side.batch, rows)))",
        "side._replace(batch=trim(take(side.batch, slice(0, rows.stop - rows.start))))",
    ),
    Mutation(
        "tables in the order of Python's hashes",
        "tests/test_layers.py::test_tables_come_in_the_order_of_their_lookup_in_every_process",
        "func/layers/anatomy.py",
        "looked_up = dict.fromkeys(use.name for use in watched.made)",
        "looked_up = {use.name for use in watched.made}",
    ),
    Mutation(
        "held sequences counted by themselves beside every block",
        f"{TILED}[E-start]",
        "engine/layerwise.py",
        "own_x=k == 0 and start == 0",
        "own_x=k == 0",
    ),
    Mutation(
        "only one node of what streams",
        f"{TILED}[U-gauss2]",
        "engine/by_layer.py",
        "_summed([handles for _, handles in blocks])",
        "blocks[0][1]",
    ),
    Mutation(
        "the held side's vectors asked of the other",
        f"{TILED}[U-midpoint]",
        "engine/streaming.py",
        "ProductSpec(spec.kernels, spec.y, spec.x, spec.key)",
        "spec",
    ),
    Mutation(
        "what streams walks once, whatever the tiles",
        f"{LAYERED}::test_tiles_take_less_memory_and_more_time",
        "engine/planning/walking.py",
        "tiles, parts = len(tiles_of(own, tile)), len(",
        "tiles, parts = 1, len(",
    ),
    Mutation(
        "a long response added up in its own dtype",
        f"{CHANGE}::test_a_small_change_of_a_long_response_is_known_to_the_rounding_of_its_tokens[whole]",
        "func/logprob.py",
        "0.0).sum(1)\n\n    return total",
        "0.0).float().sum(1)\n\n    return total",
    ),
    Mutation(
        "the same by layers",
        f"{CHANGE}::test_a_small_change_of_a_long_response_is_known_to_the_rounding_of_its_tokens[by layers]",
        "func/handles/head.py",
        "ω.double() * logprobs.double()",
        "ω * logprobs",
    ),
    Mutation(
        "a directory is lost where its successor cannot be renamed",
        "tests/test_atomic.py::test_a_directory_comes_back_where_its_successor_cannot_be_renamed",
        "io/atomic.py",
        "            os.rename(before, place)\n",
        "            pass\n",
    ),
    Mutation(
        "the dtype of results needs a first parameter with a dimension",
        "tests/test_generality.py::test_a_single_number_may_be_the_first_parameter",
        "func/inputs/source.py",
        "widened(next(iter(params.values())).new_empty(0))",
        "widened(next(iter(params.values()))[..., :0])",
    ),
    Mutation(
        "moments are read with weights alone",
        "tests/formats/test_distributed.py::test_weights_alone[prime_fsdp2]",
        "checkpoint/formats/plain.py",
        "everything if optimizer else weights_alone",
        "everything",
    ),
    Mutation(
        "what is exchanged leaves holes in the heap",
        "tests/test_recycling.py::test_blocks_are_kept_or_returned[ranks]",
        "engine/recycling.py",
        "return reuse_memory() if group is None else return_memory()",
        "return reuse_memory()",
    ),
    Mutation(
        "what is counted depends on when garbage is collected",
        "tests/test_strategies.py::test_a_count_does_not_depend_on_when_garbage_is_collected",
        "engine/planning/work.py",
        "    gc.disable()\n",
        "",
    ),
    Mutation(
        "two places along the step are there at once",
        "tests/test_certificates.py::test_one_place_along_the_step_is_there_at_a_time",
        "func/trust/comparisons.py",
        "            del leaves  # before",
        "            # before",
    ),
    Mutation(
        "a context that ends sets what was before it",
        "tests/test_recycling.py::test_contexts_end_in_any_order",
        "engine/recycling.py",
        "        _returning[0] -= 1\n            _set_thresholds(libc)",
        "        _returning[0] -= 1",
    ),
]
