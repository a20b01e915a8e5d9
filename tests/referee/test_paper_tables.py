"""The paper's tables: what they count, what they call reproduced, and the whole command, small."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import flashmoe
from flashmoe import trace
from flashmoe.cache import simulate
from flashmoe.cache.simulate import Conditions
from flashmoe.trace import Trace
from flashmoe.train import paper
from flashmoe.util import many_jobs
from harness import reproduce
from harness.report import digests, report
from harness.tables import paper_figures, paper_measured, paper_networks, paper_rates
from harness.tables.paper_figures import Case, Figure
from harness.tables.paper_witness import watch


def routing_of(rows: list[int], n_experts: int = 8) -> Trace:
    return Trace(np.array(rows, np.uint8)[:, None, None], np.zeros(len(rows), np.int32), n_experts)


def plain_shares(rows: list[int], slots: int, farsighted: bool) -> tuple[float, float]:
    """Shares of evictions, by lists: used again within 5, and LRU right where LFU differs."""
    resident: list[int] = []
    soon, right = [], []
    for now, key in enumerate(rows):
        if key in resident:
            continue
        if len(resident) == slots:
            due = {k: ([*rows[now:], k]).index(k) for k in resident}
            due = {k: d if d < len(rows) - now else 10**9 for k, d in due.items()}
            last = {k: max(t for t in range(now) if rows[t] == k) for k in resident}
            oldest = min(resident, key=last.__getitem__)
            rarest = min(resident, key=lambda k: (rows[:now].count(k), last[k]))
            if due[oldest] != due[rarest]:
                right.append(due[oldest] > due[rarest])
            victim = max(resident, key=due.__getitem__) if farsighted else oldest
            soon.append(due[victim] <= 5)
            resident.remove(victim)
        resident.append(key)
    return float(np.mean(soon)), float(np.mean(right))


@pytest.mark.parametrize("farsighted", [False, True])
def test_a_witness_counts_what_lists_count(farsighted):
    rng = np.random.default_rng(0)
    rows = np.minimum(rng.geometric(0.25, 300) - 1, 7).tolist()
    seen = watch(routing_of(rows), 3, farsighted, Conditions())
    assert tuple(seen) == pytest.approx(plain_shares(rows, 3, farsighted))
    assert 0 < seen.soon < 1 and 0 < seen.lru_right < 1


def test_a_witness_is_lru_and_soon_is_in_tokens():
    """Two experts a token: with 3 slots and 4 in turn, each is used again after two tokens."""
    experts = np.array([[0, 1], [2, 3]] * 10, np.uint8)[:, None]
    recorded = Trace(experts, np.zeros(20, np.int32), 4)
    sequential = watch(recorded, 3, False, Conditions(sequential=True))
    assert sequential.soon == pytest.approx(1, abs=0.1)  # within 10 requests; the last are not


def test_experts_touched_counts_distinct_ones():
    assert paper_figures.experts_touched(routing_of([1, 1, 2, 3, 3, 4]), 4) == 3 / 8
    assert paper_figures.experts_touched(routing_of([1, 1]), 4) is None


@pytest.mark.parametrize(
    ("holding", "verdict"),
    [([], "not measured"), ([True, True], "reproduced"), ([False], "not"),
     ([True, False], "under these conditions")],
)  # fmt: skip
def test_a_verdict_follows_its_cases(holding, verdict):
    cases = [Case(f"case {n}", float(n), holds) for n, holds in enumerate(holding)]
    row = Figure("figure", "1", "rule", cases).row()
    assert row["verdict"] == verdict
    assert row["conditions"] == ("case 0" if verdict == "under these conditions" else "")


def rates_of(**hit_rates: dict[str, float]) -> pd.DataFrame:
    """By s8, s16: the slots."""
    same = {"trace": "t", "replay": "event-atomic", "counted": "all tokens"}
    return pd.DataFrame(
        [
            same | {"slots": int(slots[1:]), "policy": policy, "hit_rate": rate}
            for slots, rates in hit_rates.items()
            for policy, rate in rates.items()
        ]
    )


def test_the_order_is_judged_at_the_small_cache():
    as_the_paper = {"lfu-in-cache": 0.41, "arc": 0.48, "lru": 0.51, "flashmoe-paper, scorer": 0.62}
    rates = rates_of(s8=as_the_paper, s16=dict.fromkeys(as_the_paper, 0.9))
    (case,) = paper_figures._order(rates).cases
    assert case == Case("t, event-atomic, all tokens, 8 slots, flashmoe-paper, scorer", 0.62, True)
    (gain,) = paper_figures._gain(rates, "lru", 0.21).cases
    assert (gain.value, gain.holds) == (round(0.62 / 0.51 - 1, 4), True)
    (worse,) = paper_figures._order(rates_of(s8=as_the_paper | {"lru": 0.47})).cases
    assert not worse.holds


def test_measured_figures_come_from_the_committed_tables(tmp_path, monkeypatch):
    folder = tmp_path / "m-full-scale"
    folder.mkdir()
    pd.DataFrame(
        [
            {"system": "flashmoe", "cap_share": 0.4, "load_seconds": 2, "first_token_seconds": 2},
            {"system": "fiddler", "cap_share": 0.4, "load_seconds": 6, "first_token_seconds": 4},
            {"system": "on-demand", "cap_share": 0.4, "wait_ms": 3.0}
            | dict.fromkeys(paper_measured.PARTS[1:], 0.25),
        ]
    ).to_csv(folder / "speedups-x.csv")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    found = {name: values for name, _, values in paper_measured.figures()}
    assert list(found["share of decode that waits for experts"].values()) == [0.75]
    assert found["initial load against fiddler, times"] == {"x on m, cap 0.4": 3.0}
    assert found["load and prefill against fiddler, times"] == {"x on m, cap 0.4": 2.5}
    assert found["initial load against llama.cpp, times"] == {}


def test_the_command_trains_replays_and_judges(tmp_path, monkeypatch):
    """On two layers of the demo model's routing; a second run trains nothing."""
    monkeypatch.setattr(paper, "ROWS", 200)
    monkeypatch.setattr(paper, "EPOCHS", 2)
    here = lambda function, jobs: (function(*job) for job in jobs)  # noqa: E731  (as patched)
    monkeypatch.setattr(many_jobs, "outcomes", here)
    whole = trace.load(flashmoe.demo_routing_path())
    part = whole.select(range(0, 36, 6))
    small = Trace(part.experts[:, :2], part.sequence, part.n_experts, info=part.info)
    routing = paper_networks.Routing("demo", "part", small.select([0, 1, 2]), small.select([3, 4]))
    monkeypatch.setattr(paper_networks, "routings", lambda folder: [routing])
    monkeypatch.setattr(report, "record", lambda *_, **__: None)
    networks = tmp_path / "networks"
    reproduce.run_paper(tmp_path / "out", "command", None, networks)
    rates = report.read(tmp_path / "out", "paper_rates")
    assert set(rates.replay) == {"event-atomic", "sequential"}
    assert set(rates.counted) == {"all tokens", "decode only"}
    row = rates[
        (rates.policy == "flashmoe-paper, vector") & (rates.slots == 16)
        & (rates.replay == "sequential") & (rates.counted == "decode only")
    ].iloc[0]  # fmt: skip
    label = f"flashmoe-paper:{networks / 'demo-sequential-vector.safetensors'}"
    conditions = Conditions(bypass=False, sequential=True, decode_only=True, prompt_tokens=64)
    fresh = simulate.replay(routing.tested, label, 0.25, conditions)
    assert (row.requests, row.hits) == (fresh.requests, fresh.hits)
    figures = report.read(tmp_path / "out", "paper")
    assert {"reproduced", "not", "not measured"} >= set(figures.verdict) - {
        "under these conditions"
    }
    training = report.read(tmp_path / "out", "paper_training")
    assert (training.rows_a_layer > 0).all()
    assert "paper's network, best reading, %" in digests.paper_rates(rates)
    monkeypatch.setattr(paper_networks, "_train", lambda *job: pytest.fail("trained again"))
    paper_networks.train_all([routing], networks, print)
    assert paper_rates.total_events([routing], networks) > 0
