"""Recording watches a model while it is open, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt

from flashmoe.engines.transformers import recorder
from flashmoe.engines.transformers.recorder import Recorder
from flashmoe.errors import FlashMoEError


def hooks(model: torch.nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_recording_leaves_no_hook_behind(loaded):
    model = loaded()
    before = hooks(model)
    recording = Recorder(model, probabilities=True)
    with recording.recording():
        assert hooks(model) > before
    assert hooks(model) == before


def test_a_recording_that_cannot_begin_leaves_no_hook_behind(loaded, monkeypatch):
    def hidden(*_: object) -> None:
        raise FlashMoEError("record without --probabilities")

    model = loaded()
    before = hooks(model)
    monkeypatch.setattr(recorder, "_routers", hidden)
    recording = Recorder(model, probabilities=True)
    with pytest.raises(FlashMoEError, match="without --probabilities"), recording.recording():
        pass
    assert hooks(model) == before
    model(prompt(3))
    assert not any(recording.experts)


def test_a_recording_that_stops_leaves_no_hook_behind(loaded):
    model = loaded()
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt), Recorder(model).recording():
        raise KeyboardInterrupt
    assert hooks(model) == before


def test_what_is_kept_as_probabilities_are_probabilities(loaded):
    model = loaded()
    recording = Recorder(model, probabilities=True)
    with recording.recording():
        recording.next_sequence()
        model(prompt(5))
    for (layer,) in recording.probabilities:
        torch.testing.assert_close(
            torch.from_numpy(layer).float().sum(-1), torch.ones(5), atol=1e-2, rtol=0
        )
    assert recording.trace({}).probabilities.shape == (5, 3, 8)
