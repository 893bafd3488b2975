"""What tests of every folder use."""

import gc
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


# What is imported stays: looking through it again and again takes a sixth of a test process's start.
gc.disable()


def pytest_collection_finish() -> None:
    """Spare the collector what was imported, which stays: pytest calls it five times at its end, for seconds."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def llama_folder() -> Path:
    """The tiny model, made once for all runs."""
    from tests import tiny_llama  # brings PyTorch, for which tests without a model need not wait

    return tiny_llama.model_folder(ROOT / ".assay" / "test-models")


@pytest.fixture(scope="session")
def llama_tokenizer(llama_folder: Path) -> Any:
    """Its tokenizer as Transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama_folder)
