"""Accounts of real runs: they add up, go on after a kill, are read back, and are shown by the commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fkernel.cli import app
from fkernel.engine import Sweep
from fkernel.errors import FKernelError, PlanError, ResultsError, RolloutError
from fkernel.record import RecordedStep, Recording, distance, replay
from fkernel.study import AccountResults, account_recording, replay_probes
from fkernel.study.accounts import assembly, computing, stopped
from tests.distributed.ranks import results
from tests.study.recorded_runs import KINDS, PROBES, STEPS, probes_file, recording_of

SMALL = "310KB"
"""A grant that holds one probe at a time of the tiny policy."""
WHOLE, TWO_NODES = 3e-3, 5e-4
"""Shares of the realised change that an account may leave, at the midpoint and with two nodes."""


def size(values: Any) -> float:
    return float(np.linalg.norm(values))


def told(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> AccountResults:
    return account_recording(recording_of("dapo"), PROBES, tmp_path_factory.mktemp("account"))


@pytest.mark.turns(6)
@pytest.mark.parametrize("kind", KINDS)
def test_the_account_of_a_real_run_adds_up(tmp_path, kind):
    recording = recording_of(kind)
    for path, bound in (("midpoint", WHOLE), ("gauss2", TWO_NODES)):
        made = account_recording(recording, PROBES, tmp_path / path, path=path)
        realised = size(made["realised"])
        assert made["contributions"].shape == (3, len(made.sequences))
        assert len(made.steps) == STEPS
        columns = made["contributions"].sum(1, dtype=np.float64)
        for name in ("before", "decay", "arithmetic", "unexplained", "remainder"):
            columns = columns + made[name]
        assert size(columns - made["realised"]) <= 1e-5 * realised
        assert size(made["remainder"]) + size(made["unexplained"]) <= max(bound * realised, 2 * size(made["floor"]))
        assert size(made["by_step"].sum(1) + made["remainder"] - made["realised"]) <= 1e-5 * realised
        assert size(made["momentum"]) > 0.3 * size(made["own"])
        rounded = kind.startswith("bf16")
        assert (size(made["arithmetic"]) > 1e-3 * realised) == rounded
    first, last = recording.snapshots[0], recording.snapshots[-1]
    assert (first, last) == (0, STEPS)
    *_, end = replay(recording)
    assert (distance(recording, end) or 0) < 1e-5


def test_a_wrong_record_is_unexplained(tmp_path, monkeypatch):
    """A step whose batch is another's: its column says so, and the rest still adds up."""
    recording, step = recording_of("dapo"), Recording.step
    swapped = lambda self, number: step(self, 3 if number == 7 else number)  # noqa: E731
    monkeypatch.setattr(Recording, "step", swapped)
    made = account_recording(recording, PROBES, tmp_path, steps=range(6, 9))
    assert size(made["unexplained"]) > 0.05 * size(made["realised"])


def test_what_is_written_is_read_back(tmp_path, whole):
    whole.save(tmp_path / "copy")
    again = AccountResults.load(tmp_path / "copy")
    assert again.probes == whole.probes
    assert again.sequence_ids == whole.sequence_ids
    assert {*again.arrays} == {*whole.arrays}
    assert all(np.array_equal(again[name], values, equal_nan=True) for name, values in whole.arrays.items())
    with np.load(tmp_path / "copy" / "account.npz") as file:
        assert file["contributions"].dtype == np.float32
        assert file["sequence_ids"][0] == "0000/U-000-00"
        assert file["probe_ids"].tolist() == ["right", "nine", "eights"]
        assert file["step_of"].tolist() == sorted(file["step_of"].tolist())
        assert file["by_step"].shape == file["own"].shape == file["momentum"].shape == (3, STEPS)
    record = json.loads((tmp_path / "copy" / "account.json").read_text())
    assert record["probes"][2]["ledger"]["realised"] == pytest.approx(float(whole["realised"][2]))
    top = record["probes"][2]["top_sequences"][0]
    assert top["value"] == pytest.approx(float(np.abs(whole["contributions"][2]).max()), rel=1e-6) or top["value"] < 0
    data = (tmp_path / "copy" / "account.npz").read_bytes()
    (tmp_path / "copy" / "account.npz").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ResultsError):
        AccountResults.load(tmp_path / "copy")


def test_questions(whole):
    prompts = whole.top_prompts("eights", 3)
    own = [
        sum(
            float(C)
            for row, C in zip(whole.sequences, whole["contributions"][2], strict=True)
            if row["prompt_id"] == p.id
        )
        for p in prompts
    ]
    assert [share.value for share in prompts] == pytest.approx(own, rel=1e-4, abs=1e-7)
    assert abs(prompts[0].value) >= abs(prompts[1].value) >= abs(prompts[2].value)
    rewards = whole.top_rewards("eights")
    assert [share.id for share in rewards] == ["digits", "brevity"]
    assert sum(share.value for share in rewards) == pytest.approx(float(whole["contributions"][2].sum()), abs=1e-5)
    assert whole["p"].shape == whole["contributions"].shape
    assert 0 < float(whole["p"].min()) <= float(whole["p"].max()) <= 1
    with pytest.raises(ResultsError, match="no probe 'none'"):
        whole.top_sequences("none")


@pytest.mark.turns(6)
def test_parts_of_the_loss_are_told_apart(tmp_path, monkeypatch):
    recording = recording_of("cispo, KL, two inner epochs")
    made = account_recording(recording, PROBES, tmp_path / "parts")
    assert made.facts["parts"] == ["loss", "kl"]
    assert made["parts"].shape == (3, STEPS, 2)
    steps = made.step_of
    for t in range(STEPS):
        assert made["parts"][:, t].sum(1) == pytest.approx(made["contributions"][:, steps == t].sum(1), abs=1e-5)
    assert size(made["parts"][:, 0, 1]) == 0  # the policy is its own reference
    assert size(made["parts"][:, :, 1]) > 1e-3 * size(made["realised"])
    shares = {share.id: share.value for share in made.top_parts("nine")}
    assert sum(shares.values()) == pytest.approx(float(made["contributions"][1].sum()), abs=1e-5)
    rewards = sum(share.value for share in made.top_rewards("nine"))
    assert rewards == pytest.approx(shares["loss"], abs=1e-5)
    monkeypatch.setattr(RecordedStep, "parts", ("loss",))
    whole = account_recording(recording, PROBES, tmp_path / "whole")
    assert size(whole["contributions"] - made["contributions"]) <= 1e-4 * size(whole["contributions"])
    with pytest.raises(ResultsError, match="has no parts"):
        whole.top_parts("nine")


@pytest.mark.turns(6)
@pytest.mark.parametrize("kind", ["cispo, KL, two inner epochs", "a ratio of sequences", "a penalty without a ratio"])
def test_the_rest_of_a_loss_with_a_penalty_is_of_advantages_alone(kind):
    """Of a sequence whose advantage is 0 the penalty is all that there is, a ratio that weighs it included."""
    recording, seen = recording_of(kind), 0
    for number in recording.steps:
        for record in recording.step(number).records:
            if abs(record.advantage or 0.0) < 1e-7 and any(record.token_weights.get("kl", ())):
                seen += 1
                assert size(record.token_weights["loss"]) <= 1e-4 * size(record.token_weights["kl"])
    assert seen > 0


@pytest.mark.turns(6)
def test_a_run_is_replayed_without_a_part_of_its_loss():
    recording = recording_of("cispo, KL, two inner epochs")
    same = replay_probes(recording, PROBES, parts={"kl": 1.0})
    assert float(same.difference.abs().max()) < 1e-4
    without = replay_probes(recording, PROBES, parts={"kl": 0.0})
    assert float(without.difference.abs().max()) > 1e-3
    with pytest.raises(PlanError, match=r"'entropy' is no part of the loss .* it has kl, loss"):
        replay_probes(recording, PROBES, parts={"entropy": 0.0})


@pytest.mark.turns(6)
def test_what_cannot_be_told_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(RecordedStep, "parts", ("loss",))
    made = account_recording(recording_of("cispo, KL, two inner epochs"), PROBES[:1], tmp_path)
    for name in ("rewards", "p"):
        with pytest.raises(ResultsError, match=r"beta=0\.05 beside its advantages"):
            made[name]


@pytest.mark.turns(6)
@pytest.mark.parametrize("snapshots", ["first", 5])
def test_states_between_snapshots_are_replayed(tmp_path, whole, snapshots):
    for left in ("states-1-of-2", "sweep-3-of-4", "sweep-3-of-4-mine"):  # as if it was stopped on several ranks before
        (tmp_path / left).mkdir()
    made = account_recording(recording_of("dapo", snapshots), PROBES, tmp_path, disk="400KB")
    assert size(made["contributions"] - whole["contributions"]) <= 1e-3 * size(whole["contributions"])
    assert size(made["realised"] - whole["realised"]) <= 1e-4 * size(whole["realised"])
    assert {file.name for file in tmp_path.iterdir()} == {"account.json", "account.npz", "lock", "sweep-3-of-4-mine"}


def test_some_steps(tmp_path, whole):
    made = account_recording(recording_of("dapo"), PROBES, tmp_path, steps=range(4, 8))
    assert [row["step"] for row in made.steps] == [4, 5, 6, 7]
    assert {row["step"] for row in made.sequences} == {4, 5, 6, 7}
    assert size(made["before"]) > 0.1 * size(made["realised"])
    assert size(made["by_step"] - whole["by_step"][:, 4:8]) <= 1e-4 * size(whole["by_step"])
    with pytest.raises(FKernelError, match="lacks the steps 12"):
        account_recording(recording_of("dapo"), PROBES, tmp_path / "more", steps=range(4, 13))


@pytest.mark.turns(6)
def test_an_account_that_was_stopped_goes_on(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(stopped, "EVERY", 0.0)
    kept, seen = stopped.KeptSweep, list[int]()

    class Stops(kept):
        def __init__(self, directory: Path, request: Any, **more: Any) -> None:
            super().__init__(directory, request, 0.0, **more)

        def __call__(self, sweep: Any) -> None:
            super().__call__(sweep)
            seen.append(sweep.taken)
            if sweep.taken in (5, 9):
                raise KeyboardInterrupt

    monkeypatch.setattr(computing, "KeptSweep", Stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            account_recording(recording_of("dapo"), PROBES, tmp_path)
        assert not (tmp_path / "account.json").exists()
    made = account_recording(recording_of("dapo"), PROBES, tmp_path)
    assert seen == [*range(1, 13)]
    assert np.array_equal(made["contributions"], whole["contributions"])
    assert np.array_equal(made["by_step"], whole["by_step"])
    assert {file.name for file in tmp_path.iterdir()} == {"account.json", "account.npz", "lock"}


class StopsOnRanks(stopped.KeptSweep):
    """Keeps every state, and fails on rank 1 after the fifth, once."""

    def __init__(self, directory: Path, request: Any, **more: Any) -> None:
        super().__init__(directory, request, 0.0, **more)

    def __call__(self, sweep: Any) -> None:
        super().__call__(sweep)
        if sweep.taken == 5 and self.group and self.group.rank == 1:
            raise PlanError("stopped")


def accounted_on_ranks(mesh: Any, recording: Path, out: Path) -> tuple[str, list[int], dict[str, Any]]:
    """What stops an account after five steps; the steps that the next one takes, and its arrays."""
    taken, error = list[int](), ""
    with patch.object(computing, "KeptSweep", StopsOnRanks):
        try:
            account_recording(recording, PROBES, out, mesh=mesh)
        except FKernelError as raised:
            error = str(raised)
    made = account_recording(recording, PROBES, out, mesh=mesh, on_progress=lambda what, n, total: taken.append(n))
    return error, taken, made.arrays


@pytest.mark.turns(6)
def test_two_ranks_give_the_account_of_one_process_and_go_on_where_they_stopped(tmp_path, whole):
    every = results(2, accounted_on_ranks, recording_of("dapo").directory, tmp_path)
    for error, taken, arrays in every:
        assert error == "Rank 1 of 2 failed: account: PlanError: stopped"
        assert taken == [5, *[1] * 7]
        assert arrays.keys() == whole.arrays.keys()
        for name in ("contributions", "before", "decay", "momentum", "by_step", "realised"):
            assert size(arrays[name] - whole[name]) <= 1e-4 * size(whole[name])
    assert {file.name for file in tmp_path.iterdir()} == {"account.json", "account.npz", "lock"}
    assert np.array_equal(AccountResults.load(tmp_path)["contributions"], every[1][2]["contributions"])


@pytest.mark.turns(6)
def test_a_stopped_account_of_several_parts_still_knows_what_was_executed(tmp_path, monkeypatch):
    """The steps that are skipped where it goes on are skipped once, and not for the probes that come after."""
    recording, kept = recording_of("bf16 autocast"), stopped.KeptSweep
    whole = account_recording(recording, PROBES[:2], tmp_path / "whole", steps=range(6), memory=SMALL)

    class Stops(kept):
        def __init__(self, directory: Path, request: Any, **more: Any) -> None:
            super().__init__(directory, request, 0.0, **more)

        def __call__(self, sweep: Any) -> None:
            super().__call__(sweep)
            if not sweep.done and sweep.taken == 3 and not begun:
                begun.append(sweep.taken)
                raise KeyboardInterrupt

    begun = list[int]()
    monkeypatch.setattr(computing, "KeptSweep", Stops)
    with pytest.raises(KeyboardInterrupt):
        account_recording(recording, PROBES[:2], tmp_path / "parts", steps=range(6), memory=SMALL)
    made = account_recording(recording, PROBES[:2], tmp_path / "parts", steps=range(6), memory=SMALL)
    assert np.array_equal(made["arithmetic"], whole["arithmetic"])
    assert np.array_equal(made["unexplained"], whole["unexplained"])
    assert float(np.abs(whole["arithmetic"]).min()) > 1e-5


def test_advantages_of_another_rule_are_not_split_by_reward(tmp_path, monkeypatch):
    records = RecordedStep.records.func

    def fewer(self: RecordedStep) -> Any:
        return records(self)[1:]  # as where a completion of the group was masked

    monkeypatch.setattr(RecordedStep, "records", property(fewer))
    taken = assembly.Taken.of(recording_of("dapo"), range(12))
    said = assembly.by_reward(taken, torch.ones(1, len(taken.records)))
    assert isinstance(said, str)
    assert "missing" in said


def test_rounding_of_equal_rewards_is_no_other_rule_of_advantages(monkeypatch):
    """A trainer's advantages of a group of equal rewards are not 0: float32's rounding, divided by 1e-4."""
    taken = assembly.Taken.of(recording_of("dapo"), range(2))
    rewards = torch.randn(len(taken.records), generator=torch.Generator().manual_seed(0))
    own = taken.group == 0
    rewards[own] = 0.8 * 3.7
    mean = torch.stack([rewards[taken.group == g].mean() for g in taken.group])
    spread = torch.stack([rewards[taken.group == g].std() for g in taken.group])
    A = (rewards - mean - own * 2.4e-7) / (torch.where(own, 0.0, spread) + 1e-4)
    assert float(A[own].abs().min()) > 1e-3

    def given(A: torch.Tensor) -> assembly.Taken:
        values = zip(taken.records, rewards.tolist(), A.tolist(), strict=True)
        records = [replace(r, rewards={"r": x}, reward_weights={"r": 1.0}, advantage=a) for r, x, a in values]
        return taken._replace(records=records)

    C = torch.ones(1, len(rewards))
    shares = assembly.by_reward(given(A), C)
    assert isinstance(shares, torch.Tensor)
    assert float(shares.sum()) == pytest.approx(float((~own).sum()))
    assert isinstance(assembly.by_reward(given(torch.where(own, 0.3, A)), C), str)


def test_a_model_that_is_given_is_left_alone(tmp_path):
    recording = recording_of("dapo")
    model = recording.policy().double()
    before = {name: leaf.clone() for name, leaf in model.named_parameters()}
    account_recording(recording, PROBES, tmp_path, steps=range(2), model=model)
    replay_probes(recording, PROBES, {"0000/U-002-03": 0.0}, upto=2, model=model)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.named_parameters())


def test_a_stopped_sweep_of_another_request_is_not_taken(tmp_path):
    sweep = Sweep((), 2, {"w": torch.ones(3, 2)}, (), torch.zeros(3))
    stopped.KeptSweep(tmp_path, {"probes": 1}, 0.0)(sweep)
    assert stopped.KeptSweep(tmp_path, {"probes": 2}).found() is None
    again = stopped.KeptSweep(tmp_path, {"probes": 1}).found()
    assert again is not None
    assert again.taken == 2
    assert torch.equal(again.rows["w"], sweep.rows["w"])
    (tmp_path / "sweep" / "sweep.safetensors").write_bytes(b"")
    assert stopped.KeptSweep(tmp_path, {"probes": 1}).found() is None


@pytest.mark.turns(6)
def test_memory_splits_the_probes(tmp_path, monkeypatch):
    """In float64: in float32 AdamW's first step divides a gradient by itself, its rounding included."""
    recording, seen = recording_of("dapo"), list[int]()
    whole = account_recording(recording, PROBES, tmp_path / "whole", steps=range(2), dtype="float64")
    monkeypatch.setattr(stopped.KeptSweep, "__call__", lambda self, sweep: seen.append(len(sweep.done)))
    made = account_recording(recording, PROBES, tmp_path / "parts", steps=range(2), dtype="float64", memory="620KB")
    assert sorted({*seen}) == [0, 1, 2]
    assert size(made["contributions"] - whole["contributions"]) <= 1e-6 * size(whole["contributions"])


@pytest.mark.turns(6)
def test_momentum_by_the_age_of_its_gradients(tmp_path, whole):
    """Against accounts of runs that end earlier: what a step's sequences did later than in it is what is older."""
    made = account_recording(recording_of("dapo"), PROBES, tmp_path / "ages", ages=True)
    for e, _ in enumerate(PROBES):
        shares = made.by_age(e)
        assert [share.id for share in shares] == ["0", "1", "2-3", "4-7", "8-15", "16-31", "32+"]
        total = float(made["own"][e].sum() + made["momentum"][e].sum())
        assert sum(share.value for share in shares) == pytest.approx(total, abs=2e-6)
        assert shares[-2].value == shares[-1].value == 0  # the run has twelve steps, and began with nothing
    sizes = np.abs([[share.value for share in made.by_age(e)] for e in range(3)]).sum(0)
    assert sizes[1] > sizes[4] > 0
    two = account_recording(recording_of("dapo"), PROBES, tmp_path / "two", steps=range(7, 9), ages=True)
    later = two["contributions"][:, two.step_of == 7].sum(1) - two["own"][:, 0]  # of step 7's sequences, in step 8
    scale = size(two["momentum"])
    assert size(two["older"][:, 0] - two["momentum"].sum(1)) <= 1e-5 * scale
    assert size(two["older"][:, 1] - two["before"]) <= 1e-5 * scale
    assert size(two["older"][:, 0] - two["older"][:, 1] - later) <= 1e-5 * scale
    with pytest.raises(FKernelError, match="snapshots='every'"):
        account_recording(recording_of("dapo", "first"), PROBES, tmp_path / "none", ages=True)


@pytest.mark.turns(6)
@pytest.mark.parametrize("observable", ["entropy", "kl"])
def test_other_observables(tmp_path, observable):
    made = account_recording(recording_of("dapo"), PROBES, tmp_path, observable=observable, path="gauss2")
    assert size(made["remainder"]) <= 2e-3 * size(made["realised"])
    assert size(made["realised"]) > 0


@pytest.mark.turns(6)
def test_expected_reward(tmp_path):
    answers = [
        {**row, "id": f"{row['id']}-{r}", "response": r, "reward": float(r == "8")} for row in PROBES for r in "89"
    ]
    made = account_recording(recording_of("dapo"), answers, tmp_path, observable="expected_reward", path="gauss2")
    assert len(made.probes) == len({row["prompt"] for row in answers})
    assert size(made["remainder"]) <= 2e-3 * size(made["realised"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "holds no probe"),
        ("{", "Line 1 .* is no JSON"),
        ('{"prompt": "3"}', "expected prompt and response"),
        ('{"prompt": "3+5=", "response": "8", "temperature": 1}', "temperature"),
        ('{"id": 1, "prompt": "3+5=", "response": "8"}\n' * 2, "Two probes have the name '1'"),
    ],
)
def test_wrong_probes(tmp_path, lines, said):
    (tmp_path / "probes.jsonl").write_text(lines)
    with pytest.raises(RolloutError, match=said):
        account_recording(recording_of("dapo"), tmp_path / "probes.jsonl", tmp_path / "out")
    with pytest.raises(RolloutError, match="cannot be read"):
        account_recording(recording_of("dapo"), tmp_path / "none.jsonl", tmp_path / "out")


@pytest.mark.turns(6)
def test_the_commands(tmp_path):
    recording, probes = recording_of("dapo").directory, probes_file(tmp_path)
    out = tmp_path / "account"
    said = told("account", recording, "--probes", probes, "--out", out, "--rows", 3).stdout
    assert "eights" in said
    assert "adds up" in said
    assert (out / "pictures").is_dir()
    found = json.loads(told("account", recording, "--probes", probes, "--out", out, "--json").stdout)
    brief = told("account", recording, "--probes", probes, "--out", out).stdout
    assert len(brief.splitlines()) <= 40
    account = AccountResults.load(out)
    most = max(account.probes, key=lambda info: abs(account["realised"][account.row(info.id)])).id
    culprit = next(
        share
        for share in account.top_sequences(most, 1000, group_identical=True)
        if share.value * account["realised"][account.row(most)] > 0
    )
    assert f"most of it by {culprit.id}" in brief
    dropped = " --drop ".join(["", *account.identical_to(culprit.id)])
    assert f"fkernel replay {recording} --probes {probes}{dropped}" in " ".join(brief.split())
    shown = told("show", out, "--rows", 3).stdout
    assert [line for line in said.splitlines() if "moved it most" in line] == [
        line for line in shown.splitlines() if "moved it most" in line
    ]
    assert json.loads(told("show", out, "--json").stdout) == found
    assert "is the account of a run" in " ".join(told("show", out, "--request", "held_out", code=2).stderr.split())
    assert [row["id"] for row in found["probes"]] == ["right", "nine", "eights"]
    other = told("account", recording, "--probes", probes, "--out", out, "--steps", "3:5", code=2).stderr
    assert "holds another account" in " ".join(other.split())
    assert "expected A:B" in told("account", recording, "--probes", probes, "--out", out, "--steps", "x", code=2).stderr
    shown = told("recording", "show", recording).stdout
    assert "12 steps" in shown
    assert "snapshots before steps 0, 1, 2" in shown
    assert len(json.loads(told("recording", "show", recording, "--json").stdout)["steps"]) == STEPS
    same = told("replay", recording, "--probes", probes).stdout
    assert "Replay of the run as it was" in same
    dropped = json.loads(told("replay", recording, "--probes", probes, "--drop", "0000/U-002-*", "--json").stdout)
    assert dropped["changed"] == 4
    assert max(abs(row["difference"]) for row in dropped["probes"]) > 1e-3
    none = told("replay", recording, "--probes", probes, "--drop", "prompt:none", code=2).stderr
    assert "matches none of the 192 sequences" in " ".join(none.split())


@pytest.mark.turns(6)
def test_the_commands_of_a_loss_with_parts(tmp_path):
    recording, probes = recording_of("cispo, KL, two inner epochs").directory, probes_file(tmp_path)
    out = tmp_path / "account"
    said = told("account", recording, "--probes", probes, "--out", out, "--ages", "--rows", 1).stdout
    assert "part of the loss" in said
    assert "steps after its own" in said
    assert (out / "pictures" / "nine_parts.png").is_file()
    without = json.loads(told("replay", recording, "--probes", probes, "--part", "kl=0", "--json").stdout)
    assert without["changed"] == without["sequences"]
    assert "NAME=NUMBER" in told("replay", recording, "--probes", probes, "--part", "kl", code=2).stderr


def test_a_recording_without_a_gap_is_needed(tmp_path):
    shutil.copytree(recording_of("dapo").directory, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "steps" / "000004")
    with pytest.raises(FKernelError, match="lacks the steps 4"):
        account_recording(tmp_path / "copy", PROBES, tmp_path / "out")
    assert "MISSING: steps 4" in told("recording", "show", tmp_path / "copy").stdout


@pytest.mark.turns(6)
def test_dropping_what_raised_a_probe_lowers_it(tmp_path):
    """Late in a run, where √v is made of many steps: in the direction, and to about the size, that the account says."""
    recording = recording_of("lora")
    made = account_recording(recording, PROBES, tmp_path, steps=range(6, STEPS))
    top = made.top_sequences("eights", 1)[0]
    changed = replay_probes(recording, PROBES, {top.id: 0.0})
    assert changed.changed == (1, len(recording.steps) * 16)
    assert float(changed.difference[2]) * top.value < 0
    assert 0.3 < -float(changed.difference[2]) / top.value < 3


def test_weights_that_change_nothing_are_the_run():
    recording = recording_of("dapo")
    same = replay_probes(recording, PROBES, {"*": 1.0})
    assert same.changed[0] == 0
    assert float(same.difference.abs().max()) < 1e-5
    assert same.distance is not None
    with pytest.raises(PlanError, match="matches none"):
        replay_probes(recording, PROBES, {"response:nothing*": 0.5})
