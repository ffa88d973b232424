"""Megatron-Core on a CPU, and which of its numbers are which of Hugging Face's.

Megatron-Core makes its buffers on "cuda" and asks parameters whether they are `torch.cuda.FloatTensor`. Here a mode of
PyTorch's answers for it: "cuda" is the CPU. Its model, its DistributedOptimizer and its writer are as they are.

    linear_qkv      rows: for each group of queries, its query heads, its key head, its value head
    linear_fc1      rows: gate, then up; each rank of tensor parallelism has a part of both
    embedding, output_layer, linear_qkv, linear_fc1     split by rows      linear_proj, linear_fc2   by columns
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from fkernel.shapes import Tree
from tests.formats.policy import BETAS, DECAY, EPS, LR, rows

TYPES = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
BY_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


class OnCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1:
            return TYPES[args[0].dtype]
        if func is torch.Tensor.cuda:
            return args[0]
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        return func(*args, **given)


def start(tensor_parallel: int) -> None:
    """Start gloo and Megatron's groups."""
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]
    from megatron.core.tensor_parallel import get_cuda_rng_tracker  # pyright: ignore[reportMissingImports]

    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda *_, **__: None
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel, 1)
    get_cuda_rng_tracker().fork = lambda *_, **__: nullcontext()  # of dropout masks, of which there are none


def gpt(config: Any, dtype: torch.dtype, tensor_parallel: int) -> Any:
    """Make the GPTModel that verl and NeMo-RL would make of a Qwen's configuration, and its TransformerConfig."""
    from megatron.core.models.gpt import GPTModel  # pyright: ignore[reportMissingImports]
    from megatron.core.models.gpt.gpt_layer_specs import (  # pyright: ignore[reportMissingImports]
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer import TransformerConfig  # pyright: ignore[reportMissingImports]

    norms = config.model_type == "qwen3"
    transformer = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=not norms,
        qk_layernorm=norms,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor_parallel,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        transformer,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=norms),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=10000,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
    )
    return model.to(dtype), transformer


def trainer(model: Any, transformer: Any, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Wrap the model for data parallelism; its DistributedOptimizer and its scheduler."""
    from megatron.core.distributed import (  # pyright: ignore[reportMissingImports]
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # pyright: ignore[reportMissingImports]
    from megatron.core.optimizer_param_scheduler import (  # pyright: ignore[reportMissingImports]
        OptimizerParamScheduler,
    )

    wrapped = DistributedDataParallel(
        transformer, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        min_lr=LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, LR, 0.0, 4, 10, "linear", DECAY, DECAY, 10, "constant", use_checkpoint_opt_param_scheduler=False
    )
    return wrapped, optimizer, scheduler


def backward(wrapped: Any, number: int) -> None:
    """Compute one step's gradient, this data-parallel rank's part of its rows, and reduce it."""
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]
    from megatron.core.distributed import finalize_model_grads  # pyright: ignore[reportMissingImports]

    of, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    tokens = rows(number).chunk(of)[rank]
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    length = inputs.shape[1]
    positions = torch.arange(length)[None].expand_as(inputs)
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    wrapped.zero_grad_buffer()
    wrapped(inputs, positions, mask, labels=labels).mean().backward()
    finalize_model_grads([wrapped])


def whole(model: Any, optimizer: Any, what: str, config: Any) -> Tree:
    """Bring one thing together that the optimizer keeps in parts, over data- and tensor-parallel ranks, in HF's names.

    Args:
        model: the GPTModel.
        optimizer: Megatron's.
        what: "param" (float32), "exp_avg", "exp_avg_sq", "grad" or "weight" (as the model has it).
        config: Hugging Face's.
    """
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]

    inner = optimizer.chained_optimizers[0]
    leaves: Tree = {}
    for name, leaf in model.named_parameters():
        if what == "weight":
            local = leaf.detach().clone()
        else:
            flat = torch.zeros(leaf.numel())
            if leaf in inner.model_param_group_index_map:  # else this rank has no part of it
                part = inner._get_model_param_range_map(leaf)["param"]
                own = inner._get_main_param_and_optimizer_states(leaf)
                own["grad"] = leaf.main_grad.view(-1)[part.start : part.end]
                flat[part.start : part.end] = own[what].detach()
            dist.all_reduce(flat, group=parallel_state.get_data_parallel_group())
            local = flat.view_as(leaf)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        parts = [torch.empty_like(local) for _ in range(ranks)]
        dist.all_gather(parts, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        leaves[name] = joined(name, parts)
    return to_hf(leaves, config)


def joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Join a parameter's parts of tensor parallelism."""
    if name.endswith(BY_COLUMNS):
        return torch.cat(parts, dim=1)
    if name.endswith("linear_fc1.weight"):
        return torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
    return torch.cat(parts) if name.endswith(BY_ROWS) else parts[0]


def split(name: str, leaf: torch.Tensor, rank: int, of: int) -> torch.Tensor:
    """Take one rank's part of a parameter."""
    if name.endswith(BY_COLUMNS):
        return leaf.chunk(of, dim=1)[rank]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(of)[rank] for half in leaf.chunk(2)])
    return leaf.chunk(of)[rank] if name.endswith(BY_ROWS) else leaf


LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


def rows_of_qkv(config: Any) -> list[tuple[str, int]]:
    """Say of each row of linear_qkv whose it is: (projection, row in it)."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per = config.num_attention_heads // config.num_key_value_heads
    placed: list[tuple[str, int]] = []
    for group in range(config.num_key_value_heads):
        for head in range(group * per, (group + 1) * per):
            placed += [("q_proj", head * size + i) for i in range(size)]
        placed += [("k_proj", group * size + i) for i in range(size)]
        placed += [("v_proj", group * size + i) for i in range(size)]
    return placed


def to_hf(leaves: Mapping[str, torch.Tensor], config: Any) -> Tree:
    """Name Megatron's parameters as Hugging Face does."""
    named: Tree = {}
    for name, leaf in leaves.items():
        if name in TOP:
            named[TOP[name]] = leaf
            continue
        _, _, layer, inside = name.split(".", 3)
        place = f"model.layers.{layer}."
        if inside in LAYER:
            named[place + LAYER[inside]] = leaf
        elif "linear_qkv" in inside:
            kind, placed = inside.rsplit(".", 1)[1], rows_of_qkv(config)
            for projection in ("q_proj", "k_proj", "v_proj"):
                picked = [i for i, (whose, _) in enumerate(placed) if whose == projection]
                named[f"{place}self_attn.{projection}.{kind}"] = leaf[picked]
        else:
            named[f"{place}mlp.gate_proj.weight"], named[f"{place}mlp.up_proj.weight"] = leaf.chunk(2)
    return named


def from_hf(weights: Mapping[str, torch.Tensor], name: str, config: Any) -> torch.Tensor:
    """Make one of Megatron's parameters, whole, of Hugging Face's."""
    if name in TOP:
        return weights[TOP[name]]
    _, _, layer, inside = name.split(".", 3)
    place = f"model.layers.{layer}."
    if inside in LAYER:
        return weights[place + LAYER[inside]]
    if "linear_qkv" in inside:
        kind = inside.rsplit(".", 1)[1]
        return torch.stack([weights[f"{place}self_attn.{whose}.{kind}"][row] for whose, row in rows_of_qkv(config)])
    return torch.cat([weights[f"{place}mlp.gate_proj.weight"], weights[f"{place}mlp.up_proj.weight"]])
