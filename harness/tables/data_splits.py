"""Which sequences of which trace the shipped policy learnt from, and which are held out."""

from __future__ import annotations

import hashlib

from flashmoe.trace import Trace

UNSEEN_KINDS = ("french-manual", "kernel-docs")  # of the small models' text: never trained on
UNSEEN_SUBJECTS_ONE_IN = 4  # of the MMLU subjects
HELD_OUT_DOCUMENTS = ("0", "1")  # of each kind that is trained on

TRAINED, SEEN_DOMAIN, UNSEEN_DOMAIN = "trained on", "held out, seen domain", "unseen domain"


def part_of(name: str) -> str:
    """Where a sequence belongs, by its name: `kind-number`, or `mmlu_dev/subject/number`."""
    if "/" in name:
        subject = name.split("/")[1]
        unseen = hashlib.sha256(subject.encode()).digest()[0] % UNSEEN_SUBJECTS_ONE_IN == 0
        return UNSEEN_DOMAIN if unseen else TRAINED
    kind, _, number = name.rpartition("-")
    if kind in UNSEEN_KINDS:
        return UNSEEN_DOMAIN
    return SEEN_DOMAIN if number in HELD_OUT_DOCUMENTS else TRAINED


def take(whole: Trace, *parts: str) -> Trace:
    """The sequences of `whole` in these parts."""
    positions = [i for i, name in enumerate(whole.names()) if part_of(name) in parts]
    return whole.select(positions)
