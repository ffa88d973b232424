"""`python -m benchmarks.device --device cuda`: the same numbers on an accelerator, and how long they take there.

    agreement   kernel, influence, a step, an account of a run, in float64 and float32, on the device against the CPU
    recorded    a loop that is recorded, replayed and accounted for there
    half        494M parameters, 8 × 16 sequences of 512 tokens: K against plain batched backward passes over the same
    long        the same shape, 2 × 4 sequences of 4096 tokens, layer by layer
    large       6.7 billion parameters, 2 × 4 sequences of 512 tokens, beside the parameters and P

Results and environment go to benchmarks/results/device.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment
from benchmarks.limits import plain_backward
from benchmarks.models import SHAPES, Subject, build, model_of
from fkernel import explain_step, func, influence, kernel, precond
from fkernel.engine import RunStep, SortedBatch, account, computed, gradient_in, self_kernel
from fkernel.func.inputs import Sequences

RESULTS = ROOT / "benchmarks" / "results" / "device.json"
LARGE = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def on(content: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Move tensors; floating ones to a dtype."""
    if isinstance(content, torch.Tensor):
        return content.to(device, dtype if dtype is not None and content.is_floating_point() else content.dtype)
    if isinstance(content, dict):
        return {name: on(leaf, device, dtype) for name, leaf in content.items()}
    return type(content)(*(on(leaf, device, dtype) for leaf in content))


def apart(ours: Any, theirs: Any) -> float:
    """‖x − y‖ / ‖y‖."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def cases(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the engine computes of a small model, on a device."""
    subject = build("tiny")
    apply = func.make_functional(model_of("tiny", "eager").to(device, dtype))[0]
    f, params = func.sequence_logprob(apply), on(subject.params, device, dtype)
    E, U = on(subject.batch(3, 24, 1), device), on(subject.batch(5, 24, 2), device)
    P = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in params.items()})
    w = torch.linspace(-1, 1, 5, dtype=dtype, device=device)
    long_E, long_U = on(subject.batch(1, 1100, 1), device), on(subject.batch(2, 1100, 2), device)
    made = {
        "kernel": kernel(f, params, E, U, P),
        "kernel within a grant": kernel(f, params, E, U, P, memory="40MB"),
        "influence": influence(f, params, E, U, P, w),
        "kernel, layer by layer": kernel(f, params, long_E, long_U, P),
    }
    state = _state(subject, device, dtype)
    effect, _ = explain_step(f, params, E, U, w, state, max_norm=1.0)
    made |= {
        "step: batch": effect.batch,
        "step: momentum": effect.momentum,
        "step: contributions": effect.contributions,
    }
    ω = torch.rand(U.input_ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    weighed = func.Weighted(U, ω * U.response_mask, None)
    g = func.weighted_logprob(apply)
    made["token weights"] = kernel(g, params, weighed, weighed, P)
    step = RunStep(g, params, weighed, -torch.ones(5, dtype=torch.float64), state)
    made["account"] = account(f, E, [step]).contributions[0]
    gradients = computed(SortedBatch("U", U, f), ((1.0, params),), [slice(0, 2), slice(2, 5)])
    made["kernel of U with itself"], made["norms"] = self_kernel(gradients, P.d)  # pyright: ignore[reportAttributeAccessIssue]
    made["summed gradients"] = torch.cat([leaf.flatten() for leaf in gradients.weighted_sum(w).values()])
    plain = gradient_in(g, params, weighed, torch.ones(5, device=device, dtype=dtype))
    made["plain gradient"] = torch.cat([leaf.flatten() for leaf in plain.values()])
    return made


def _state(subject: Subject, device: str, dtype: torch.dtype) -> precond.AdamWState:
    state = subject.adamw_state()
    moments = {key: on(getattr(state, key), device, dtype) for key in state.MOMENTS}
    return type(state)(**{**vars(state), **moments})


def agreement(device: str) -> dict[str, Any]:
    """Relative differences of the device from the CPU."""
    exact = cases("cpu", torch.float64)
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        ours = cases(device, dtype)
        found[str(dtype)[6:]] = {name: apart(ours[name], exact[name]) for name in exact}
    return found


def recorded(device: str) -> dict[str, Any]:
    """A loop recorded on the device, replayed and accounted for there."""
    from fkernel.demo.tokenizer import build_tokenizer
    from fkernel.record import Recorder, Recording, distance, replay
    from fkernel.study import FisherKernelPlan, FisherKernelRunner, account_recording

    model = model_of("tiny", "sdpa").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    subject, steps = build("tiny"), 4
    with tempfile.TemporaryDirectory() as directory:
        with Recorder(directory, model, optimizer, "every", tokenizer=build_tokenizer()) as recorder:
            for number in range(steps):
                U = on(subject.batch(4, 24, number), device)
                U = U._replace(input_ids=U.input_ids % 13 + 2)
                with recorder.step():
                    z = model(U.input_ids, attention_mask=U.attention_mask.long()).logits[:, :-1]
                    log_p = z.log_softmax(-1).gather(-1, U.input_ids[:, 1:, None])[..., 0]
                    masks = {"attention_mask": U.attention_mask, "response_mask": U.response_mask}
                    log_p = recorder.tap(log_p, input_ids=U.input_ids, **masks)
                    weights = torch.linspace(-1, 1, 4, device=device)[:, None] * U.response_mask[:, 1:]
                    (-(weights * log_p).sum() / 40).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                optimizer.zero_grad()
        recording = Recording.open(directory)
        checks = [float(recording.step(n).check["relative_error"]) for n in recording.steps]  # pyright: ignore
        *_, last = replay(recording, device=device)
        probes = [{"prompt_ids": [3, 4], "response_ids": [5, n]} for n in range(6, 9)]
        made = {
            place: account_recording(recording, probes, f"{directory}/{place}", path="gauss2", device=place)
            for place in (device, "cpu")
        }
        ours, theirs = (torch.from_numpy(made[place]["contributions"]) for place in (device, "cpu"))
        left = torch.from_numpy(made[device]["remainder"] + made[device]["unexplained"])
        plan = {
            "checkpoint": {"recording": directory, "step": 1},
            "update": {"kind": "recorded"},
            "template": "bare",
            "requests": [{"kind": "update", "name": "itself"}],
            "numerics": {"device": device},
            "out": f"{directory}/study",
        }
        study = FisherKernelRunner(FisherKernelPlan.model_validate(plan)).run()
        calibration = study["itself"].calibration["predicted"]
        return {
            "gradient check": max(checks),
            "replay, of the run's way": distance(recording, last),
            "account: contributions, from the CPU's": apart(ours, theirs),
            "account: remainder and unexplained": float(
                left.norm() / torch.from_numpy(made[device]["realised"]).norm()
            ),
            "study of a recorded step: relative error": calibration.relative_error,
            "study of a recorded step: audit": study.step["audit"]["verdict"],
        }


def timed(run: Callable[[], Any], device: str, repeats: int = 3) -> tuple[float, float]:
    """Median seconds of warm runs, and the peak of allocated bytes above what was there."""
    run()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated() if cuda else 0, []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2], float(torch.cuda.max_memory_allocated() - before) if cuda else 0.0


def speed(shape: str, n_E: int, n_U: int, T: int, device: str, repeats: int = 3) -> dict[str, Any]:
    """K of a shape against plain batched passes over the same sequences."""
    with torch.device(device):
        model = model_of(shape, "eager")
    apply, params = func.make_functional(model)
    f = func.sequence_logprob(apply)
    subject = Subject(shape, apply, params, f, SHAPES[shape]["vocab_size"])
    E, U = on(subject.batch(n_E, T, 1), device), on(subject.batch(n_U, T, 2), device)
    P = precond.diagonal({name: torch.rand_like(leaf) + 0.5 for name, leaf in params.items()})
    kernel_s, kernel_bytes = timed(lambda: kernel(f, params, E, U, P), device, repeats)
    result = {
        "shape": shape, "parameters": subject.size, "n_E": n_E, "n_U": n_U, "T": T,
        "kernel_s": kernel_s, "kernel_GiB": kernel_bytes / 2**30, "parameters_GiB": 4 * subject.size / 2**30,
    }  # fmt: skip
    try:
        m = max(1, 4096 // T)
        sides = [Sequences(*(leaf[i : i + m] for leaf in side)) for side in (E, U) for i in range(0, len(side[0]), m)]
        plain_s, plain_bytes = timed(lambda: [plain_backward(subject, side, m) for side in sides], device, repeats)
        result |= {"backward_s": plain_s, "backward_GiB": plain_bytes / 2**30, "ratio": kernel_s / plain_s}
    except torch.OutOfMemoryError:
        result["backward_s"] = None
    return result


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", default=["agreement", "recorded", "half", "long", "large"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    device = given.device
    SHAPES["large"] = LARGE
    sections: dict[str, Callable[[], Any]] = {
        "agreement": lambda: agreement(device),
        "recorded": lambda: recorded(device),
        "half": lambda: speed("half-billion", 8, 16, 512, device),
        "long": lambda: speed("half-billion", 2, 4, 4096, device),
        "large": lambda: speed("large", 2, 4, 512, device, 2),
        "small": lambda: speed("small", 2, 4, 64, device),
    }
    about = environment() | {"device": torch.cuda.get_device_name() if device.startswith("cuda") else device}
    results: dict[str, Any] = {"environment": about}
    for name in given.only:
        try:
            results[name] = sections[name]()
        except Exception:  # the other sections are worth having
            results[name] = {"failed": traceback.format_exc()[-3000:]}
        print(name, json.dumps(results[name], indent=1), flush=True)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
