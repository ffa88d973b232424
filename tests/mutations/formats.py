"""Checkpoints of trainers: how ranks' parts come together, and what is told of files."""

from tests.mutants import Mutation

DEEPSPEED, FSDP = "tests/formats/test_deepspeed.py", "tests/formats/test_fsdp.py"
MEGATRON, DCP = "tests/formats/test_megatron.py", "tests/formats/test_distributed.py"
REFUSALS = "tests/checkpoint/test_refusals.py"
FORMATS = "checkpoint/formats"
MUTATIONS = [
    Mutation(
        "gaps between ZeRO's parameters are numbers of theirs",
        f"{DEEPSPEED}::test_the_state_is_deepspeeds[deepspeed_zero2_aligned]",
        f"{FORMATS}/deepspeed/flat.py",
        "end += shape.numel() + (gaps[place] if gaps else 0)",
        "end += shape.numel()",
    ),
    Mutation(
        "ZeRO-3's parts are rounded down",
        f"{DEEPSPEED}::test_the_state_is_deepspeeds[deepspeed_zero3_subgroups]",
        f"{FORMATS}/deepspeed/sliced.py",
        "each = -(-shape.numel() // ranks)",
        "each = shape.numel() // ranks",
    ),
    Mutation(
        "masters are left beside the rounded weights",
        f"{DEEPSPEED}::test_the_state_is_deepspeeds[deepspeed_zero2_bf16]",
        "checkpoint/loading.py",
        "leaf.data = stored.masters[name].to(leaf.device, leaf.dtype)",
        "leaf.data = leaf.data + 0",
    ),
    Mutation(
        "FSDP's cut dimension is split as evenly as can be",
        f"{FSDP}::test_the_state_is_the_trainings[verl_fsdp2]",
        f"{FORMATS}/fsdp/parts.py",
        "piece = -(-length // mesh.shape[dim])",
        "piece = max(1, length // mesh.shape[dim])",
    ),
    Mutation(
        "keys are where values are in Megatron's fused weights",
        f"{MEGATRON}::test_the_state_is_the_writers[megatron_qwen3]",
        f"{FORMATS}/megatron_names.py",
        '"self_attn.k_proj": [(qkv, _head(groups, heads, slice(-2, -1)))]',
        '"self_attn.k_proj": [(qkv, _head(groups, heads, slice(-1, None)))]',
    ),
    Mutation(
        "prime-rl's masters are not the parameters",
        f"{DCP}::test_the_state_is_the_writers[prime_offload]",
        "checkpoint/contents.py",
        'MASTERS = ("prime_rl_master_weight",)',
        "MASTERS = ()",
    ),
    Mutation(
        "sums of files are not looked at",
        f"{REFUSALS}::test_a_flipped_byte_of_a_tensor_is_no_other_number[True]",
        "checkpoint/files.py",
        "if entry.CRC == 0:",
        "if entry.CRC >= 0:",
    ),
    Mutation(
        "a file's name is believed",
        f"{REFUSALS}::test_a_rank_s_file_under_another_ranks_name_is_told",
        "checkpoint/files.py",
        "if written is not None and written != path.stem:",
        "if written is None:",
    ),
    Mutation(
        "a NaN is within the rounding of its master",
        f"{REFUSALS}::test_a_master_that_is_no_number_is_refused",
        "precond/executed.py",
        "apart = ~((master - theta).abs() <= rounding * master.abs() + torch.finfo(torch.float32).tiny)",
        "apart = (master - theta).abs() > rounding * master.abs() + torch.finfo(torch.float32).tiny",
    ),
    Mutation(
        "weights that are not finite are loaded",
        f"{REFUSALS}::test_weights_that_are_not_finite_are_refused",
        "checkpoint/loading.py",
        "if leaf.is_floating_point() and leaf.numel() and not all(",
        "if leaf.numel() < 0 and not all(",
    ),
    Mutation(
        "the last of two tied weights wins",
        "tests/checkpoint/test_layouts.py::test_tied_weights_that_differ_are_two",
        "checkpoint/weights.py",
        "if one.data_ptr() != two.data_ptr() and not torch.equal(one, two):",
        "if one.shape != two.shape:",
    ),
]
