"""Records which experts a model chooses, at the door of each experts module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from flashmoe.engines.transformers.experts.lookahead import Lookahead
from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace


class Recorder:
    """Collects the routing of every forward pass while `recording(model)` is open."""

    def __init__(
        self, model: PreTrainedModel, *, probabilities: bool = False, guesses: bool = False
    ) -> None:
        self.modules = moe_modules.expert_modules(model)
        if not self.modules:
            raise FlashMoEError("this model has no experts to record")
        self.model = model
        self.wants_probabilities = probabilities
        self.experts: list[list[np.ndarray]] = [[] for _ in self.modules]
        self.weights: list[list[np.ndarray]] = [[] for _ in self.modules]
        self.probabilities: list[list[np.ndarray]] = [[] for _ in self.modules]
        self.lookahead = Lookahead(model) if guesses else None
        self.guesses: list[list[np.ndarray]] = [[] for _ in list(self.modules)[1:]]
        self.sequence: list[int] = []  # per token of layer 0
        self.step: list[int] = []
        self.current_sequence = -1

    def next_sequence(self) -> None:
        self.current_sequence += 1

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """While open, the model's forward passes are recorded; whatever happens, not after.

        Raises FlashMoEError where `probabilities` are wanted of a family that hides its routers.
        """
        with ExitStack() as hooks:
            for number, module in enumerate(self.modules.values()):
                hooks.enter_context(module.register_forward_pre_hook(self._experts_hook(number)))
            if self.wants_probabilities:
                for number, router in enumerate(_routers(self.model, len(self.modules))):
                    hooks.enter_context(router.register_forward_hook(self._router_hook(number)))
            yield self

    def _experts_hook(self, number: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            hidden, index, weights = arguments
            if number == 0:
                step = self.step[-1] + 1 if self.step else 0
                self.step += [step] * len(index)
                self.sequence += [self.current_sequence] * len(index)
            self.experts[number].append(index.cpu().numpy().astype(np.uint16))
            self.weights[number].append(weights.detach().float().cpu().numpy().astype(np.float16))
            if self.lookahead and number < len(self.guesses):
                routed = self.lookahead.route(number + 1, hidden)
                if routed is None:
                    raise FlashMoEError(
                        f"{type(self.model).__name__}'s routers cannot be asked ahead: record "
                        "without --guesses"
                    )
                self.guesses[number].append(routed.experts.cpu().numpy().astype(np.uint16))

        return hook

    def _router_hook(self, number: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, arguments: object, output: tuple[torch.Tensor, ...]) -> None:
            probabilities = output[0].detach().float().softmax(-1).cpu()
            self.probabilities[number].append(probabilities.numpy().astype(np.float16))

        return hook

    def trace(self, info: Mapping[str, object]) -> Trace:
        """All that was recorded, as one trace."""
        n_experts = max(map(moe_modules.n_experts, self.modules.values()))
        number_type = np.uint8 if n_experts <= 256 else np.uint16

        def joined(parts: list[list[np.ndarray]]) -> np.ndarray:
            return np.stack([np.concatenate(layer) for layer in parts], axis=1)

        return Trace(
            experts=joined(self.experts).astype(number_type),
            sequence=np.array(self.sequence, dtype=np.int32),
            n_experts=n_experts,
            weights=joined(self.weights),
            probabilities=joined(self.probabilities) if self.wants_probabilities else None,
            step=np.array(self.step, dtype=np.int32),
            guesses=joined(self.guesses).astype(number_type) if any(self.guesses) else None,
            info=dict(info),
        )


def _routers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The modules whose first output transformers itself records as router logits.

    Raises FlashMoEError for a family that does not declare them that way.
    """
    for owner in model.modules():
        with suppress(AttributeError, KeyError, TypeError):
            recorder = owner._can_record_outputs["router_logits"]  # type: ignore[index,union-attr]
            if getattr(recorder, "index", 0) == 0:
                kind = getattr(recorder, "target_class", recorder)
                found = [module for module in model.modules() if isinstance(module, kind)]
                if len(found) == count:
                    return found
    raise FlashMoEError(
        f"{type(model).__name__} does not declare its routers: record without --probabilities"
    )


def record(
    model: PreTrainedModel,
    prompts: list[torch.Tensor],
    *,
    max_new_tokens: int,
    probabilities: bool = False,
    guesses: bool = False,
    info: Mapping[str, object] | None = None,
) -> Trace:
    """The routing of each prompt (token ids [tokens]) and of what the model continues it with.

    One sequence a prompt, greedy, batch 1; with max_new_tokens=0 only the prompt is run, in
    one forward pass, which routes as a teacher-forced decode of it would.
    """
    recorder = Recorder(model, probabilities=probabilities, guesses=guesses)
    with recorder.recording(), torch.inference_mode():
        for prompt in prompts:
            recorder.next_sequence()
            ids = prompt[None].to(model.device)
            if max_new_tokens:
                mask = torch.ones_like(ids)
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
                )
            else:
                model(ids, use_cache=False)
    return recorder.trace(info or {})
