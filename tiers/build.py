"""Source weights to a checkpoint with its manifest. Runs in the quantization environment, one build a process.

``python -m tiers.build REQUEST`` takes a `BuildRequest` as JSON and writes one JSON event a line
to standard output: what it does, then either ``done`` or the sentence of the error. Everything else that the
libraries print goes to standard error.
"""

import errno
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tiers.catalog import ModelShape, checked_shape
from tiers.errors import AssayError, BuildError
from tiers.manifest import Calibration, Manifest, describe_files
from tiers.recipe import Recipe, find_recipe
from tiers.reference import write_reference
from tiers.source import Source
from tiers.weights import bits_per_weight

SEED = 20311
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "safetensors")
"""Those whose version can change what a build writes."""

if TYPE_CHECKING:
    from tiers.calibration import CalibrationText

Say = Callable[[str], None]


class BuildRequest(BaseModel):
    """One checkpoint to build: ``reference`` is the folder of the BF16 checkpoint that it is quantized from."""

    model: str
    recipe: str
    source: Source
    target: Path
    reference: Path | None = None


def build(request: BuildRequest, say: Say) -> Manifest:
    """Build one checkpoint. It appears under its name only when it is whole.

    Raises:
        AssayError: with the sentence of what is missing, or that the disk is full.
    """
    recipe = find_recipe(request.recipe)
    with _staged(request) as folder, _disk_errors(folder):
        if request.reference is None:
            provenance, revision = write_reference(request.source, folder, say)
            checked_shape(folder, request.model, request.source)
            recipe_text, calibration, reference = "", None, None
        else:
            origin = Manifest.read(request.reference)
            recipe_text = recipe.text_for(ModelShape.read(request.reference))  # refuses before any work
            calibration = _quantize(recipe, recipe_text, request.reference, folder, say)
            provenance, revision, reference = origin.provenance, origin.revision, origin.digest
        for file in folder.glob("*.safetensors"):
            if not file.is_symlink():
                file.chmod(0o644)  # written for their owner alone; engines may run as another user
        say("taking digests")
        shape = ModelShape.read(folder)
        manifest = Manifest(
            model=request.model,
            recipe=recipe.name,
            recipe_text=recipe_text,
            precision=recipe.precision_for(shape),
            source=request.source,
            provenance=provenance,
            revision=revision,
            reference=reference,
            calibration=calibration,
            seed=SEED,
            bits_per_weight=bits_per_weight(folder, shape),
            versions=_versions(),
            created=datetime.now(UTC),
            files=describe_files(folder),
        )
        manifest.write(folder)
    return manifest


def _quantize(recipe: Recipe, recipe_text: str, reference: Path, folder: Path, say: Say) -> Calibration | None:
    """Quantize the reference checkpoint into ``folder`` and return what it was calibrated on, if anything."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tiers.calibration import answered_prompts

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    text = None
    if recipe.calibrated:
        say("the reference answers the calibration prompts")
        # On all GPUs that the tier has, and in RAM what they do not hold.
        where = "auto" if torch.cuda.is_available() else "cpu"
        answering = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16, device_map=where)
        text = answered_prompts(answering, tokenizer)
        del answering
    say("loading the reference")
    # In RAM: llm-compressor moves one block at a time to the GPU by itself.
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    say(f"quantizing: {recipe.name}")
    quantize(model, recipe_text, text)
    say("writing safetensors")
    model.save_pretrained(folder, save_compressed=True)
    # The reference's own tokenizer files, not a rewritten set: every tier must see the same tokens.
    for pattern in ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.json", "merges.txt"):
        for file in reference.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return text.entry if text else None


def quantize(model: Any, recipe_text: str, text: "CalibrationText | None") -> None:
    """Quantize ``model`` in place as the recipe says; ``text`` is None for one that needs no calibration."""
    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        # AWQ of llm-compressor 0.14.0.1 pins its cache for a GPU, which raises where there is none.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    if text is None:
        llmcompressor.oneshot(model=model, recipe=recipe_text)
        return
    rows = [each.tokens for each in text.conversations]
    llmcompressor.oneshot(
        model=model,
        recipe=recipe_text,
        dataset=Dataset.from_dict({"input_ids": rows}),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )


@contextmanager
def _staged(request: BuildRequest) -> Iterator[Path]:
    """A folder beside the target that takes its place at the end; after an error nothing is under that name.

    Parts of a hub download are kept in it, so that the next try of the same source goes on from there.
    """
    target, staging = request.target, request.target.with_name(request.target.name + ".partial")
    resumable = request.reference is None and request.source.kind == "hub"
    note = staging.with_suffix(".source")
    source = request.source.model_dump_json()
    if not (resumable and note.exists() and note.read_text() == source):
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    if resumable:
        note.write_text(source)
    try:
        yield staging
    except BaseException:
        if not resumable:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    note.unlink(missing_ok=True)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Say a full disk in a sentence, whichever library met it and however it wrapped it."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "No space left on device" in str(error):
            free = shutil.disk_usage(folder).free
            raise BuildError(
                f"The disk that holds {folder.parent} is full ({free >> 20} MiB free): make room, or set `home` "
                "in the config to another disk."
            ) from error
        raise


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def main() -> int:
    """Build what the only argument asks for; see the module's docstring."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(**event: str) -> None:
        events.write(json.dumps(event) + "\n")

    request = BuildRequest.model_validate_json(sys.argv[1])
    try:
        manifest = build(request, say=lambda text: emit(event="step", text=text))
    except AssayError as error:
        emit(event="error", text=str(error))
        return 1
    emit(event="done", text=manifest.digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
