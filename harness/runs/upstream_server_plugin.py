"""A pytest plugin for llama.cpp's own server tests: serves one file in place of their downloads.

Environment: FLASHMOE_TESTED_MODEL, the GGUF file that every text model's preset becomes.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MODEL = "FLASHMOE_TESTED_MODEL"
# Files of other kinds (embeddings, pictures, rerankers) cannot be replaced by a text model.
_TEXT_MODELS = ("stories260K", "stories15M_MOE")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before the suite's conftest imports `utils`."""
    sys.modules.setdefault("wget", ModuleType("wget"))  # only for downloads, of which none is made
    sys.path.insert(0, str(early_config.rootpath))
    utils: Any = importlib.import_module("utils")  # the suite's own
    start = utils.ServerProcess.start

    def start_with_ours(server: Any, *arguments: Any, **options: Any) -> Any:
        if any(name in (server.model_hf_repo or "") + (server.model_hf_file or "")
               for name in _TEXT_MODELS):  # fmt: skip
            server.model_hf_repo = server.model_hf_file = None
            server.model_file = str(Path(os.environ[MODEL]))
        elif server.model_hf_repo and not server.models_dir:
            pytest.skip(f"{server.model_hf_repo} is not a text model: it is not replaced")
        elif not server.model_hf_repo and not server.model_file:
            pytest.skip("a router, which FlashMoE refuses")
        return start(server, *arguments, **options)

    utils.ServerProcess.start = start_with_ours
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # it would download
