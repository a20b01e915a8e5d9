"""transformers' handlers of requests, as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

import transformers
from jinja2 import TemplateError
from starlette.responses import Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState

from flashmoe.engines.transformers.serving import answers, stop_texts
from flashmoe.engines.transformers.serving.errors import Refused, one_line
from flashmoe.engines.transformers.serving.generations import Generations
from flashmoe.engines.transformers.serving.job import current

# Settings of sampling that front ends send besides OpenAI's, and their types.
_SAMPLING = {"top_k": int, "min_p": float, "repetition_penalty": float}
_TEXTS = ("text", "input_text", "output_text")


class OneQueue(GenerationState):
    """Lets the requests of all handlers generate in one order."""

    def __init__(self, generations: Generations) -> None:
        super().__init__()
        self._generations = generations

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generations:
        return self._generations


class _Handler(BaseHandler):
    """What all three share."""

    last_event = ""

    async def handle_request(self, body: Any, request_id: str) -> Response:
        """Raises HTTPException for a request that cannot be answered, and Failed."""
        if not isinstance(body, dict):
            raise Refused(400, "a request is a JSON object")
        try:
            _check(body)
            answer = await super().handle_request(body, request_id)
        except KeyError as error:
            raise Refused(400, f"the request lacks {one_line(error)}") from error
        except (TypeError, ValueError, AttributeError, TemplateError) as error:
            raise Refused(400, f"the request cannot be read: {one_line(error)}") from error
        return answers.completed(answer, current.get(), last=self.last_event)

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request({k: v for k, v in body.items() if k not in _SAMPLING})

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        """The one model, whatever name is asked for, as llama-server does."""
        manager = self.model_manager
        return manager.name, manager.model, manager.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> transformers.GenerationConfig:
        job = current.get()
        # transformers would seed at once, amid another request's generation
        job.seed = _seed(body.get("seed"))
        config = super()._build_generation_config(
            {**body, "seed": None}, model_generation_config, use_cb
        )
        for name, kind in _SAMPLING.items():
            if body.get(name) is not None:
                setattr(config, name, kind(body[name]))
        # transformers samples only if generation_config.json says so
        if body.get("temperature") or (body.get("top_p") and body.get("temperature") is None):
            config.do_sample = True
        # transformers would leave the stop text in the answer, and find it in the prompt
        job.stops = _stops(config.stop_strings)
        config.stop_strings = None
        config.num_beams = config.num_return_sequences = 1
        config.use_cache, config.cache_implementation = True, None
        config.return_dict_in_generate = False
        return config


class ChatHandler(_Handler, ChatCompletionHandler):
    last_event = "[DONE]"

    def _build_completion(self, request_id: str, content: str, *rest: Any, **more: Any) -> Any:
        # a parser of a model's answers begins from the tokens again
        content = stop_texts.cut(content, current.get().stops)
        return super()._build_completion(request_id, content, *rest, **more)


class TextHandler(_Handler, CompletionHandler):
    last_event = "[DONE]"


class AnswerHandler(_Handler, ResponseHandler):
    async def handle_request(self, body: Any, request_id: str) -> Response:
        if isinstance(body, dict):
            body.setdefault("stream", False)  # OpenAI's default, and not transformers'
        return await super().handle_request(body, request_id)


def _check(body: dict[str, Any]) -> None:
    """Raises Refused for what would be left out silently."""
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise Refused(400, f"one answer at a time is given: leave {name} out, or let it be 1")
    messages = body.get("messages", body.get("input"))
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part["type"] not in _TEXTS:
                raise Refused(400, f"only text is read here, but a message has {part['type']}")


def _seed(seed: Any) -> int | None:
    if seed is not None and not (isinstance(seed, int) and -(1 << 63) <= seed < 1 << 63):
        raise Refused(400, "seed must be an integer of 64 bits")
    return seed


def _stops(stops: Any) -> tuple[str, ...]:
    stops = [stops] if isinstance(stops, str) else stops or []
    if not all(isinstance(stop, str) for stop in stops):
        raise Refused(400, "stop must be a text, or a list of texts")
    return tuple(stop for stop in stops if stop)
