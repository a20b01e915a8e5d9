"""Generates for one request after another, in the order of their coming."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.cli.serving.utils import BaseGenerateManager, _StreamError

from flashmoe.engines.transformers.model import moe_modules
from flashmoe.engines.transformers.serving import stop_texts
from flashmoe.engines.transformers.serving.errors import Failed, Refused, one_line
from flashmoe.engines.transformers.serving.job import Gone, Job, current
from flashmoe.engines.transformers.serving.kept_prefixes import KeptPrefixes
from flashmoe.engines.transformers.serving.token_stream import Stopped, TokenStream


class Generations(BaseGenerateManager):
    """What transformers' handlers let generate.

    context: the tokens that prompt and answer may have together. thread: what generates.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        prefixes: KeptPrefixes,
        context: int,
        thread: ThreadPoolExecutor,
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self.context = context
        self._experts = list(moe_modules.expert_modules(model).values())
        self._thread = thread
        self._ending = False
        self._unfinished: set[Future[None]] = set()

    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return max(0, len(self._unfinished) - 1)

    def _submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        done = self._thread.submit(function, *arguments)
        self._unfinished.add(done)
        done.add_done_callback(self._unfinished.discard)
        return done

    def generate_streaming(
        self,
        model: transformers.PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: transformers.GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], TokenStream]:
        """A queue of what a TokenStream sends, and None at the end or an error. See `_admit`."""
        job = self._admit(inputs, gen_config)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def send(item: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        check = partial(self._check, job)
        stream = TokenStream(processor._tokenizer, job.stops, check, send, response_parser)

        def run() -> None:
            try:
                self._generate(job, inputs, gen_config, stream)
            except Failed as failure:
                send(_StreamError(one_line(failure)))
            else:
                send(None)

        self._submit(run)
        return queue, stream

    async def generate_non_streaming(
        self,
        model: transformers.PreTrainedModel,
        processor: Any,
        inputs: Any,
        gen_config: transformers.GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        """Text, tokens of the prompt, and the token ids of the answer.

        Raises Failed when it breaks off, and as `_admit`.
        """
        job = self._admit(inputs, gen_config)
        stream = TokenStream(processor._tokenizer, job.stops, partial(self._check, job))
        done = self._submit(self._generate, job, inputs, gen_config, stream)
        await asyncio.wrap_future(done)
        text = processor.decode(stream.token_ids, skip_special_tokens=True)
        return stop_texts.cut(text, job.stops), inputs["input_ids"].shape[1], stream.token_ids

    def stop(self) -> None:
        """End what runs and refuse what waits: their clients are told that the server ends."""
        self._ending = True

    def close(self) -> None:
        """`stop`, and wait for the thread to end."""
        self.stop()
        self._thread.shutdown()

    def _admit(self, inputs: Any, config: transformers.GenerationConfig) -> Job:
        """The request at hand; its answer is bounded by the context.

        Raises Refused where the prompt has no token, or leaves no room for one of an answer.
        """
        prompt_tokens = inputs["input_ids"].shape[1]
        if not prompt_tokens:
            raise Refused(400, "the prompt is empty: give at least one character")
        room = self.context - prompt_tokens
        if room < 1:
            raise Refused(
                400,
                f"the prompt has {prompt_tokens} tokens, but prompt and answer together may have "
                f"{self.context}: shorten it, or serve the model with a larger --context",
                "context_length_exceeded",
            )
        asked = room if config.max_new_tokens is None else config.max_new_tokens
        if asked < 1:
            raise Refused(400, f"an answer of {asked} tokens was asked for: ask for at least one")
        config.max_new_tokens = min(asked, room)
        return current.get()

    def _generate(
        self,
        job: Job,
        inputs: Any,
        config: transformers.GenerationConfig,
        stream: TokenStream,
    ) -> None:
        """Let the model generate; ends silently when nobody waits. Raises Failed."""
        try:
            self._check(job)
            if job.seed is None:
                torch.seed()
            else:
                torch.manual_seed(job.seed)
            with (
                torch.inference_mode(),
                self._watched_prefill(job, stream),
                self._prefix(job, inputs, config, stream) as cache,
            ):
                self.model.generate(  # type: ignore[operator]
                    **inputs, **cache, generation_config=config, streamer=stream
                )
            ended_itself = stream.token_ids[-1] in _end_tokens(config)
        except Stopped:
            stream.end()
            ended_itself = True
        except Gone:
            return
        except Exception as error:
            raise Failed(one_line(error)) from error
        if ended_itself:
            config.max_new_tokens = None  # by it, handlers tell why an answer ended

    @contextmanager
    def _prefix(
        self,
        job: Job,
        inputs: Any,
        config: transformers.GenerationConfig,
        stream: TokenStream,
    ) -> Iterator[dict[str, Cache]]:
        """What `generate` needs to go on from an earlier turn; kept for the next one afterwards."""
        prompt = inputs["input_ids"][0].tolist()
        taken = self.prefixes.take(prompt, len(prompt) + config.max_new_tokens)
        if taken is None:
            yield {}
            return
        job.cached_tokens = len(taken.token_ids)
        broken_off = True  # amid a forward pass, so that some layers have more tokens than others
        try:
            yield {"cache": taken.cache}
            broken_off = False
        except (Stopped, Gone):
            broken_off = not stream.token_ids
            raise
        finally:
            answered = len(stream.token_ids)
            whole = len(prompt) + answered - 1 if answered else job.cached_tokens
            if broken_off and taken.can_cut(whole):
                taken.cut(whole)
                broken_off = False
            if not broken_off:
                self.prefixes.keep(taken, prompt + stream.token_ids)

    def _check(self, job: Job) -> None:
        """Raises Gone when nobody waits, and Failed when the server ends."""
        if self._ending:
            raise Failed("the server was told to end")
        job.check_waiting()

    @contextmanager
    def _watched_prefill(self, job: Job, stream: TokenStream) -> Iterator[None]:
        """A prompt may take minutes: whether somebody waits is asked in each of its layers."""
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._check(job))
            for module in self._experts
        ]

        def remove() -> None:
            while hooks:
                hooks.pop().remove()

        stream.on_first = remove
        try:
            yield
        finally:
            remove()


def _end_tokens(config: transformers.GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
