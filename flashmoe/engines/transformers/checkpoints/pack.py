"""Packs a Hugging Face checkpoint into a store, after checking that it makes a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.engines.transformers.checkpoints.given_back import GivenBack
from flashmoe.engines.transformers.checkpoints.weight_files import REMEDY
from flashmoe.engines.transformers.model import dense_weights, empty_model
from flashmoe.errors import FlashMoEError
from flashmoe.quant import NONE
from flashmoe.store.manifest import Manifest
from flashmoe.store.writer import Progress, write_store


def pack(
    checkpoint: Path,
    store: Path,
    *,
    quant: str = NONE,
    progress: Progress = lambda d, t: None,
    give_back: bool = False,
    also: Sequence[Path] = (),
    stripe: bool = False,
) -> Manifest:
    """Pack the Hugging Face directory `checkpoint` into the directory `store`.

    quant: the name of a quantiser of `flashmoe.quant`; none: a checkpoint that was published
    quantised stays as it is. progress: called with the bytes of experts
    that were written, and with those in all. give_back: `checkpoint` is of the hub's cache, which
    loses its weights while they are packed, so that the disk holds them once. also, stripe: see
    `write_store`.
    Raises FlashMoEError when the checkpoint is unusable, and as `write_store` does; a store that
    was there stays usable then.
    """
    opened = GivenBack if give_back else Checkpoint
    with opened(checkpoint, dequantise=quant != NONE) as source:
        model = empty_model.build(source.config, source.dtype)
        dense_weights.check_complete(model, source.dense(meta=True), checkpoint, REMEDY)
        try:
            return write_store(source, checkpoint, store, progress, quant, also, stripe=stripe)
        except FlashMoEError as error:
            if isinstance(source, GivenBack) and not source.is_in_cache:
                raise FlashMoEError(
                    f"{error}; the hub's cache has given its copy back: it will be fetched again"
                ) from None
            raise
