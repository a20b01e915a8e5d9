"""Records which experts a model chooses, by hooks on its experts modules and routers."""

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
    """Collects the routing of every forward pass of `model` while `recording()` is open.

    experts, weights, probabilities, guesses: by layer, an array of each forward pass: chosen
        experts and the router's shares [tokens, top_k], probabilities [tokens, experts], and what
        the router of the layer above would choose [tokens, top_k].
    step, sequence: by token, the forward pass and the sequence that it belongs to, from 0.
    """

    def __init__(
        self, model: PreTrainedModel, *, probabilities: bool = False, guesses: bool = False
    ) -> None:
        """probabilities, guesses: record these too. Raises FlashMoEError without experts."""
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
        self.sequence: list[int] = []
        self.step: list[int] = []
        self.current_sequence = -1

    def next_sequence(self) -> None:
        """What is recorded from now on belongs to another sequence."""
        self.current_sequence += 1

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """The model's forward passes are recorded while this is open, and never afterwards.

        Raises FlashMoEError where `probabilities` are to be recorded of a family that hides its
        routers.
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
                output = self.lookahead.route(number + 1, hidden)
                if output is None:
                    raise FlashMoEError(
                        f"{type(self.model).__name__}'s routers cannot be asked ahead: record "
                        "without --guesses"
                    )
                self.guesses[number].append(output.experts.cpu().numpy().astype(np.uint16))

        return hook

    def _router_hook(self, number: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, arguments: object, output: tuple[torch.Tensor, ...]) -> None:
            probabilities = output[0].detach().float().softmax(-1).cpu()
            self.probabilities[number].append(probabilities.numpy().astype(np.float16))

        return hook

    def trace(self, info: Mapping[str, object]) -> Trace:
        """Everything that was recorded, as one trace; info: what to say of it in the file."""
        n_experts = max(map(moe_modules.n_experts, self.modules.values()))
        expert_dtype = np.uint8 if n_experts <= 256 else np.uint16

        def joined(passes: list[list[np.ndarray]]) -> np.ndarray:
            """By layer, the arrays of each forward pass -> [tokens, layers, ...]."""
            return np.stack([np.concatenate(layer) for layer in passes], axis=1)

        return Trace(
            experts=joined(self.experts).astype(expert_dtype),
            sequence=np.array(self.sequence, dtype=np.int32),
            n_experts=n_experts,
            weights=joined(self.weights),
            probabilities=joined(self.probabilities) if self.wants_probabilities else None,
            step=np.array(self.step, dtype=np.int32),
            guesses=joined(self.guesses).astype(expert_dtype) if any(self.guesses) else None,
            info=dict(info),
        )


def _routers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The `count` modules whose first output transformers itself records as router logits.

    Raises FlashMoEError for a family that does not declare them that way.
    """
    for owner in model.modules():
        with suppress(AttributeError, KeyError, TypeError):
            recorder = owner._can_record_outputs["router_logits"]  # type: ignore[index,union-attr]
            if getattr(recorder, "index", 0) == 0:
                router_class = getattr(recorder, "target_class", recorder)
                routers = [m for m in model.modules() if isinstance(m, router_class)]
                if len(routers) == count:
                    return routers
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

    Each prompt is one sequence, decoded greedily in a batch of 1. With max_new_tokens=0 only the
    prompt is run, in one forward pass, which routes as a teacher-forced decode of it would.
    Raises FlashMoEError as `Recorder` does.
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
