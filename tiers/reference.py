"""Lays the reference checkpoint down: the source's own weights, in BF16. Runs in the quantization environment."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tiers.catalog import ModelShape
from tiers.digests import sha256_of
from tiers.errors import SourceError
from tiers.source import Source

Say = Callable[[str], None]

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
"""What is taken from a folder or the hub: safetensors only, never pickles, never code."""


class Origin(NamedTuple):
    """Where reference weights came from."""

    provenance: str
    """One sentence a person reads."""
    revision: str | None = None
    """The commit of a hub model that was downloaded, whatever branch was asked for."""


def write_reference(source: Source, folder: Path, say: Say) -> Origin:
    """Fill ``folder`` with the reference weights of ``source``.

    Raises:
        SourceError: the source cannot be had, is not a Llama in safetensors, is not whole, or is quantized.
    """
    writers = {"package": _from_package, "hub": _from_hub, "folder": _from_folder}
    origin = writers[source.kind](source, folder, say)
    ModelShape.read(folder)
    _check_whole(source, folder)
    dtypes = _dtypes(source, folder)
    if dtypes != {"BF16"}:
        stored = " and ".join(sorted(dtypes))
        origin = origin._replace(provenance=f"{origin.provenance} Stored as {stored}, computed in BF16.")
    return origin


def _check_whole(source: Source, folder: Path) -> None:
    """Every shard that the index names must be there."""
    if not any(folder.glob("*.safetensors")):
        raise SourceError(f"{source.id} holds no safetensors files; other weight formats are not loaded.")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).exists())
        if missing:
            raise SourceError(
                f"{source.id} lacks {missing[0]}, which its {index.name} names: complete the folder."
            )


def _dtypes(source: Source, folder: Path) -> set[str]:
    """The number formats of the weights, which must be such that BF16 can stand for them."""
    from safetensors import safe_open

    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        raise SourceError(
            f"{source.id} is quantized (its config.json has a quantization_config); a reference is made from the "
            "weights as trained: name that model instead."
        )
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:  # types only: no need of PyTorch
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  # no mapping
    if not found <= {"BF16", "F16", "F32"}:
        raise SourceError(
            f"{source.id} holds weights in {', '.join(sorted(found))}; a reference is BF16, F16 or F32."
        )
    return found


def _from_package(source: Source, folder: Path, say: Say) -> Origin:
    """Write the GGUF file that a Python package carries as a BF16 Hugging Face checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        version = importlib.metadata.version(source.id)
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"The package {source.id} is not in the quantization environment: run `make install`."
        ) from None
    # Its file is read in place; the package itself is never imported, so what it depends on is not needed.
    files = importlib.metadata.files(source.id) or []
    gguf = next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)
    if gguf is None or not gguf.is_file():
        raise SourceError(f"The package {source.id} {version} carries no GGUF file: install it again.")
    say(f"dequantizing {gguf.name}")
    where = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    say("writing safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Origin(
        f"Dequantized to BF16 from {gguf.name}, a Q4_1 file (about 5 bits per weight), of the package "
        f"{source.id} {version} (sha256 {sha256_of(gguf)}). These are not the weights as trained."
    )


def _from_hub(source: Source, folder: Path, say: Say) -> Origin:
    """Download a hub revision; an interrupted download goes on where it stopped."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        commit = HfApi().model_info(source.id, revision=source.revision).sha
        say(f"downloading {source.id} at {commit}")
        snapshot_download(source.id, revision=commit, local_dir=folder, allow_patterns=list(MODEL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SourceError(
            f"{source.id} cannot be downloaded from the hub ({reason}): check the id, the network, and, for a "
            "gated model such as Llama 3.1, that its licence is accepted and HF_TOKEN is set; "
            "or set source to a local folder."
        ) from error
    return Origin(f"Downloaded from the Hugging Face hub: {source.id} at {commit}, weights as published.", commit)


def _from_folder(source: Source, folder: Path, say: Say) -> Origin:
    """Link to a local folder's files: 800 GB of weights are not copied."""
    origin = Path(source.id)
    if not origin.is_dir():
        raise SourceError(f"The model folder {origin} does not exist: correct `source` in the config.")
    say(f"linking {origin}")
    for pattern in MODEL_FILES:
        for file in sorted(origin.glob(pattern)):
            _link(file.resolve(), folder / file.name)
    return Origin(f"Weights as found in the local folder {origin}.")


def _link(target: Path, link: Path) -> None:
    """A symbolic link to large files; small ones are copied so that later edits there change nothing here."""
    if link.suffix == ".safetensors":  # the target of a hub cache's own link is a blob without one
        link.symlink_to(target)
    else:
        shutil.copyfile(target, link)
