"""Patterns of sequences: many of them at once, each matched against what it names."""

from __future__ import annotations

import time

from fkernel.record import Recording
from fkernel.study.accounts.counterfactual import weigher
from tests.record.loops import adamw, gpt2, train


def test_many_ids_are_as_quick_as_one(tmp_path):
    model = gpt2()
    train(tmp_path, range(3), model, adamw(model))
    recording = Recording.open(tmp_path)
    ids = [name for number in range(3) for name in recording.step(number).sequence_ids]
    many = {**dict.fromkeys(ids[:7], 0.0), **{f"{ids[7][:-1]}[{ids[7][-1]}]": 0.5}, "0002/*": 2.0}
    start = time.perf_counter()
    factor, (changed, of) = weigher(recording, range(3), many)
    assert time.perf_counter() - start < 5
    records = {
        name: record for n in range(3) for name, record in zip(ids[5 * n :], recording.step(n).records, strict=False)
    }
    assert [factor(name, records[name]) for name in ids] == [0.0] * 7 + [0.5, 1.0, 1.0] + [2.0] * 5
    assert (changed, of) == (13, 15)
