"""A plan: what is asked of model and machine, and how it is told."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmoe import engines
from flashmoe.engines import hub
from flashmoe.engines.hub_heads import heads_of
from flashmoe.engines.model_facts import ModelFacts
from flashmoe.plan import choice, machine, measured, planner
from flashmoe.plan.choice import Candidate
from flashmoe.plan.machine import Machine
from flashmoe.plan.planner import AUTO, Between, Outlook, Request
from flashmoe.util.sizes import format_bytes

_LEAST_FILE_BYTES = 64 << 20  # of a file that tells of a drive's speed


@dataclass(frozen=True)
class Plan:
    """Everything that `flashmoe plan` says."""

    model: str  # with the file that was chosen, if there was a choice
    request: Request
    facts: ModelFacts
    machine: Machine
    files: list[Candidate]  # of a repository of several
    budgets: list[Outlook]
    advised: Outlook | None
    curves: list[str]  # whose routing the hit rates are of
    commands: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = self.facts
        sizes = {
            "expert_bytes": facts.expert_bytes,
            "touched_bytes": facts.touched_bytes,
            "cache_bytes_per_1000_tokens": facts.cache_bytes(1000),
        }
        document = asdict(self)
        document["facts"] |= sizes
        for row in [*document["budgets"], *filter(None, [document["advised"]])]:
            for name, value in row.items():
                if isinstance(value, tuple):
                    row[name] = dict(zip(Between._fields, value, strict=True))
        return document


def make(model: str, request: Request) -> Plan:
    """Raises FlashMoEError where the model cannot be run, or its heads cannot be had."""
    figures = measured.load()
    model = str(hub.kept_here(model) or model)
    sizes = hub.gguf_sizes(model) if hub.is_name(model) and ":" not in model else {}
    files: list[Candidate] = []
    if sizes:
        first = min(sizes, key=lambda file: sizes[file])
        facts, here = _look(f"{model}:{first}")
        files = choice.candidates(sizes, facts, here, request, figures)
        best = choice.chosen(files)
        model = f"{model}:{best.file if best else first}"
        if best and best.file != first:
            facts = _facts(model)
    else:
        facts, here = _look(model)
    budgets = planner.outlooks(facts, here, request, figures)
    advised = planner.advised(budgets)
    curves = [curve.trace for curve in measured.curves_for(figures, facts)]
    commands = _commands(model, facts, advised, request)
    return Plan(model, request, facts, here, files, budgets, advised, curves, commands)


def _look(model: str) -> tuple[ModelFacts, Machine]:
    """The model, and the machine measured with reads of the size of its experts."""
    facts = _facts(model)
    file = None if hub.is_name(model) else _large_file(Path(model))
    return facts, machine.measure(file, int(facts.expert_bytes), _folder_of(model))


def _facts(model: str) -> ModelFacts:
    with heads_of(model) as path:
        facts: ModelFacts = engines.engine_for(path).describe(path)
    return facts


def _large_file(path: Path) -> Path | None:
    """The largest file of a model, if reading it tells how fast the drive is."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    status = largest.stat()
    whole = status.st_blocks * 512 >= status.st_size  # holes are read at memory's speed
    return largest if whole and status.st_size >= _LEAST_FILE_BYTES else None


def _folder_of(model: str) -> Path:
    """On the drive from which the model will be read."""
    if hub.is_name(model):
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
    path = Path(model).absolute()
    return path if path.is_dir() else path.parent


def _commands(
    model: str, facts: ModelFacts, advised: Outlook | None, request: Request
) -> list[str]:
    """What to paste; none where nothing fits."""
    if advised is None:
        return []
    memory = AUTO if advised.budget == AUTO else f"{-(-advised.memory_bytes >> 20)}MiB"
    name = shlex.quote(model)
    serve = f"flashmoe serve {name} --memory {memory} --context {request.context_tokens}"
    if facts.engine != "llama":
        generate = f"flashmoe generate {name} --memory {memory}"
        if request.arithmetic == "fast":  # which a server does not take
            return [f'{generate} --arithmetic fast --prompt "..."']
        return [f'{generate} --prompt "..."', serve]
    if hub.is_name(model):
        return [serve]
    served = f"llama-server -m {name} -c {request.context_tokens}"
    return [f"flashmoe run --memory {memory} {served}", serve]


def text(plan: Plan) -> str:
    """For people."""
    return "\n\n".join(filter(None, [_model(plan), _machine(plan), _files(plan), _table(plan)]))


def _model(plan: Plan) -> str:
    facts = plan.facts
    lines = [
        f"{plan.model}: {facts.architecture}, {_count(facts.parameters)} weights, "
        f"{facts.bits_per_weight:.1f} bits each",
        f"  experts      {format_bytes(facts.experts_bytes)}, {facts.weights}: {facts.layers} "
        f"layers x {facts.n_experts}, of {format_bytes(facts.expert_bytes)} each",
        f"  all else     {format_bytes(facts.dense_bytes)}, which stays in memory",
        f"  a token      uses {facts.top_k} experts a layer: {format_bytes(facts.touched_bytes)}, "
        f"and {format_bytes(facts.dense_token_bytes)} of all else",
        f"  KV cache     {format_bytes(facts.cache_bytes(1000))} for the first 1,000 tokens, "
        f"{format_bytes(facts.cache_bytes(plan.request.context_tokens))} for "
        f"{plan.request.context_tokens:,}",
    ]
    return "\n".join(lines)


def _machine(plan: Plan) -> str:
    here = plan.machine
    vectors = "with" if here.avx512 else "without"
    cores = "1 core" if here.cores == 1 else f"{here.cores} cores"
    lines = [
        f"This machine: {cores}, {vectors} AVX-512",
        f"  memory       {format_bytes(here.available_bytes)} free, "
        f"{here.memory_bytes_per_second / 1e9:.1f} GB/s; new memory "
        f"{here.new_memory_bytes_per_second / 1e9:.1f} GB/s",
        f"  drive        {here.drive_bytes_per_second / 1e9:.2f} GB/s, measured on "
        f"{here.drive_measured_on}",
    ]
    return "\n".join(lines)


def _files(plan: Plan) -> str:
    if not plan.files:
        return ""
    lines = [f"{'token/s':>8} {'bits':>5} {'size':>10}  file, with the memory that is free"]
    for one in plan.files:
        speed = f"{one.tokens_per_second:.1f}" if one.tokens_per_second else "no room"
        mark = "  <- of this" if plan.model.endswith(f":{one.file}") else ""
        size = format_bytes(one.size_bytes)
        lines.append(f"{speed:>8} {one.bits_per_weight:>5.1f} {size:>10}  {one.file}{mark}")
    return "\n".join(lines)


def _table(plan: Plan) -> str:
    first = f"first token of {plan.request.prompt_tokens}"
    lines = [f"{'experts':>8} {'memory':>10} {'hits':>6}  {'token/s':<19} {first} tokens, seconds"]
    for row in plan.budgets:
        note = "" if row.fits else "  more than is free"
        mark = "  <- advised" if row is plan.advised else note
        lines.append(
            f"{row.budget:>8} {format_bytes(row.memory_bytes):>10} {row.hit_rate.expected:>6.0%}  "
            f"{_between(row.tokens_per_second):<19} {_between(row.first_token_seconds)}{mark}"
        )
    known = ", ".join(plan.curves)
    lines += ["", f"Eight of ten measured runs lay in such ranges. Hit rates: routing of {known}."]
    if not plan.commands:
        asked = plan.request.memory_bytes is not None
        what, instead = (
            ("So much", "ask for less") if asked else ("Nothing", "take a smaller model")
        )
        does = "does not fit" if asked else "fits"
        lines += ["", f"{what} {does} the memory that is free: free some, or {instead}."]
    for command in plan.commands:
        lines += ["", f"    {command}"]
    return "\n".join(lines)


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e8 else f"{weights / 1e6:.1f} million"


def _between(value: Between) -> str:
    return f"{value.expected:.3g} ({value.low:.3g}-{value.high:.3g})"
