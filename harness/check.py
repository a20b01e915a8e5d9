"""Do the committed results come out of this code? Run by CI."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines
import flashmoe
from baselines.flashmoe_engine import FlashMoE
from flashmoe import trace
from flashmoe.cache import simulate
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from harness.datapoints import check as datapoint_check
from harness.datapoints import files as datapoint_files
from harness.demo.prompts import PROMPTS
from harness.progress import say
from harness.report import report
from harness.tables import hit_rates
from harness.tables.full_scale import MODELS, PROMPT_TOKENS, SHIPPED, TOKENS, WARM_UP_TOKENS

# The network that shipped before `learned` could bypass. Rows that it made are replayed with it.
_EARLIER = f"learned:{Path(__file__).with_name('learned_before_bypass.safetensors')}"
_BYPASS_SINCE = "2026-11-29"  # of hit-rate tables, which do not tell otherwise


def check() -> None:
    """Raises FlashMoEError listing every figure that this code does not reproduce."""
    wrong = [*_hit_rates(), *_full_scale(), *_servers(), *_engine(), *_provenance()]
    wrong += datapoint_check.refused(datapoint_files.committed())
    if wrong:
        raise FlashMoEError("results do not reproduce:\n  " + "\n  ".join(wrong))
    say("the committed results reproduce")


def _hit_rates() -> Iterator[str]:
    """Cold rows of the demo model in every committed table, replayed anew, equal in every digit."""
    say("replaying the hit-rate tables")
    committed = sorted(report.RESULTS.glob("*/hit_rates.csv"))
    if not committed:
        yield "results/ holds no hit_rates.csv"
        return
    cases = hit_rates.shipped_cases(hit_rates.demo_expert_bytes())
    rows, _ = hit_rates.table(cases, lambda n: None, ("cold",), (0.25, 0.5))
    with TemporaryDirectory() as folder:
        fresh_path = f"{folder}/hit_rates.csv"
        pd.DataFrame(rows).to_csv(fresh_path, index=False, float_format="%.6g")
        fresh = _compared(pd.read_csv(fresh_path))
    for path in committed:
        table = _compared(pd.read_csv(path))
        both = set(table.policy) & set(fresh.policy)  # policies come, and one has its own tables
        if report.records(path.parent)["hit_rates"]["date"] < _BYPASS_SINCE:
            both.remove("learned")
            if not _made_by_earlier(table[table.policy == "learned"], cases):
                yield f"{path.relative_to(report.RESULTS)}: the earlier `learned` hit otherwise"
        try:
            pd.testing.assert_frame_equal(_of(table, both), _of(fresh, both))
        except AssertionError as error:
            yield f"{path.relative_to(report.RESULTS)}: {str(error).splitlines()[-1]}"


def _made_by_earlier(rows: pd.DataFrame, cases: Sequence[hit_rates.Case]) -> bool:
    """Does the earlier network hit as these rows of the demo model say?"""
    routing = {case.part: case.routing for case in cases}
    conditions = simulate.Conditions(bypass=False)
    fresh = [
        simulate.replay(routing[row.part], _EARLIER, row.capacity, conditions).hit_rate
        for row in rows.itertuples()
    ]
    return np.allclose(rows.hit_rate, fresh, rtol=0, atol=5.1e-6)  # rounded to five places


def _of(table: pd.DataFrame, policies: set[str]) -> pd.DataFrame:
    return table[table.policy.isin(policies)].reset_index(drop=True)


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """What `_hit_rates` replays of a table read back, without the timings.

    A table whose other rows lack the bytes a token has them as floats, which are written with
    six digits: so many are compared.
    """
    is_compared = (
        (table.trace == "demo") & (table.start == "cold") & table.capacity.isin((0.25, 0.5))
    )
    rows = table[is_compared].drop(columns="microseconds", errors="ignore").reset_index(drop=True)
    return rows.assign(bytes_per_token=[float(f"{n:.6g}") for n in rows.bytes_per_token])


def _full_scale() -> Iterator[str]:
    """The engine's measured hit rates under caps, replayed: the same policy, slots and routing.

    Of the routing that the project ships; rows made with other traces stand for themselves.
    """
    say("replaying the hit rates of the capped runs")
    engines = {
        name: kind.policy
        for name, kind in baselines.available().items()
        if issubclass(kind, FlashMoE) and kind.uses_budget
    }
    for path in sorted(report.RESULTS.glob("*/speedups-*.csv")):
        table = pd.read_csv(path)
        shipped = table.routing.str.startswith(SHIPPED)
        if "warm_up_tokens" not in table:  # made before it was noted: of whole runs it is known
            table["warm_up_tokens"] = table.tokens.eq(TOKENS).map({True: WARM_UP_TOKENS})
        earlier = "bypass_slots" not in table
        if earlier:
            table["bypass_slots"] = 0
        counted = table[shipped & table.warm_up_tokens.notna() & table.system.isin(engines)]
        for row in counted.itertuples():
            policy, shared = engines[row.system], bool(row.shared)
            if earlier and policy == "learned":
                policy = _EARLIER
                if shared:  # it told waits in another unit, which only layers together compare
                    continue
            first = PROMPT_TOKENS + int(row.warm_up_tokens)
            decoded = slice(first, first + int(row.tokens))
            conditions = simulate.Conditions(
                as_recorded=True, shared=shared, bypass=bool(row.bypass_slots)
            )
            fresh = _decode_hit_rate(str(row.model), policy, row.slots, conditions, decoded)
            if abs(fresh - row.hit_rate) > 5e-7:  # written with six digits
                yield (
                    f"{path.relative_to(report.RESULTS)}: {row.system} at {row.slots:.4g} slots "
                    f"hit {row.hit_rate:.6g}, replayed {fresh:.6g}"
                )


def _decode_hit_rate(
    model: str, policy: str, slots: float, conditions: simulate.Conditions, decoded: slice
) -> float:
    """Of the decoded tokens that a capped run counts: what two replays from cold differ by."""
    routing = MODELS[model]
    recorded = trace.load(routing.trace).named(routing.sequence)
    counted = []
    for tokens in (decoded.start, decoded.stop):
        step = np.maximum(np.arange(tokens, dtype=np.int32) - PROMPT_TOKENS + 1, 0)
        part = replace(recorded.first(tokens), step=step)
        counted.append(simulate.replay(part, policy, 1.0, conditions, slots=slots))
    before, after = counted
    return (after.hits - before.hits) / (after.requests - before.requests)


def _servers() -> Iterator[str]:
    """Recorded runs of llama.cpp, replayed: requests and hits are the trace's own, and the row's.

    Tables that were made before runs were recorded name no trace.
    """
    say("replaying the recorded runs of llama.cpp")
    rows: dict[Path, Any] = {}
    for path in sorted(report.RESULTS.glob("*/servers-*.csv")):
        table = pd.read_csv(path)
        if "trace" in table:
            named = table[table.trace.notna()]
            rows |= {path.parent / str(row.trace): row for row in named.itertuples()}
    for path in sorted({*rows, *report.RESULTS.glob("*/trace-servers-*.npz")}):
        try:
            wrong = _recorded_run(path, rows.get(path))
        except FlashMoEError as error:
            wrong = str(error)
        if wrong:
            yield f"{path.relative_to(report.RESULTS)}: {wrong}"


def _recorded_run(path: Path, row: Any) -> str | None:
    """What of a recorded run a replay, or its row in the table, contradicts."""
    if row is None:
        return "no row of a table names it"
    recorded = trace.load(path)
    said = [recorded.info.get(name) for name in ("slots", "requests", "hits")]
    if said[0] != row.slots_per_layer:
        return f"recorded with {said[0]} slots a layer, in the table {row.slots_per_layer:g}"
    policy, bypass = str(recorded.info.get("policy")), bool(recorded.info.get("bypass_slots"))
    if policy == "learned" and "bypass_slots" not in recorded.info:
        policy = _EARLIER
    conditions = simulate.Conditions(as_recorded=True, bypass=bypass)
    fresh = simulate.replay(recorded, policy, 1.0, conditions, slots=row.slots_per_layer)
    if [fresh.requests, fresh.hits] != said[1:]:
        return f"recorded {said[2]} hits of {said[1]}, replayed {fresh.hits} of {fresh.requests}"
    if f"{fresh.hit_rate:.6g}" != f"{row.hit_rate:.6g}":  # written with six digits
        return f"its row hit {row.hit_rate:.6g}, replayed {fresh.hit_rate:.6g}"
    return None


def _engine() -> Iterator[str]:
    """Streamed output equals resident output; the engine's counts equal the simulator's."""
    say("generating with the engine, in memory, and in the simulator")
    path = flashmoe.demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPTS["bible"], return_tensors="pt")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    mask = torch.ones_like(ids)
    expected = whole.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    model = flashmoe.load(path, memory="9MiB", policy="learned")
    try:
        output = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
        if not torch.equal(output, expected):
            yield "the engine's tokens differ from transformers' own"
        model.flashmoe.reset()
        trace = record(model, [ids[0]], max_new_tokens=32)
        stats = model.flashmoe.stats()
        slots = model.flashmoe.snapshot().slots_per_layer
        conditions = simulate.Conditions(as_recorded=True, bypass=stats["bypass_slots"] > 0)
        outcome = simulate.replay(trace, "learned", 1.0, conditions, slots=slots)
        if (outcome.requests, outcome.hits) != (stats["requests"], stats["hits"]):
            yield f"engine {stats['hits']} hits, simulator {outcome.hits}"
    finally:
        model.flashmoe.close()


def _provenance() -> Iterator[str]:
    """Each table stands beside a record of where it came from, and a committed run made it."""
    for folder in report.RESULTS.iterdir():
        if not folder.is_dir() or folder.name == datapoint_files.FOLDER_NAME:
            continue
        path = folder / "provenance.json"
        if not path.exists():
            yield f"{folder.name} has no provenance.json"
            continue
        for name, entry in json.loads(path.read_text()).items():
            for key in ("command", "commit", "date", "machine", "versions"):
                if not entry.get(key):
                    yield f"{folder.name}/{name}: provenance lacks {key}"
            if entry.get("uncommitted_changes"):
                yield f"{folder.name}/{name} was made by code that was never committed"
