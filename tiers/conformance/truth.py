"""The reference implementation's view of a pack's answers: Hugging Face Transformers, in FP32.

A program of its own, for the gateway holds no PyTorch: it reads a pack and writes another one of the same answers,
whose hidden states are those of Transformers. How much memory that takes is `conformance.room`'s to say.
"""

import argparse
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.head import likeliest
from tiers.conformance.layers import Chats, LlamaByLayers
from tiers.conformance.pack import Answer, Pack, head_of
from tiers.conformance.sequence import TOP


@torch.inference_mode()
def write_truth(pack: Pack, checkpoint: Path, folder: Path, earlier: Pack | None = None) -> Pack:
    """Compute every answer of the pack in FP32 and keep the final hidden states.

    Args:
        pack: whose answers.
        checkpoint: the reference checkpoint's folder.
        folder: where the new pack is to be.
        earlier: one that this made of the first of the answers, which are taken over.
    """
    done = len(earlier.share(folder)) if earlier else 0
    at = head_of(checkpoint)
    found = _final_states(checkpoint, pack.answers[done:])
    with safe_open(at.file, framework="pt") as tensors:
        head = tensors.get_tensor(at.name)
    for answer, hidden in found:
        given = torch.tensor(answer.answer)
        file = folder / answer.hidden
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": hidden.contiguous()} | likeliest(hidden, head, given, TOP)._asdict(), file)
    version = importlib.metadata.version("transformers")
    return Pack.write(
        folder,
        pack.origin,
        pack.answers,
        engine=f"transformers {version}, float32",
        prompts=pack.prompts,
        corpus=pack.corpus,
        seed=pack.seed,
    )


def _final_states(checkpoint: Path, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Tensor]]:
    """Each answer with the states that predict its tokens, [A, H]."""
    prompts: dict[tuple[int, ...], list[Answer]] = {}
    for answer in answers:
        prompts.setdefault(tuple(answer.prompt), []).append(answer)
    for given, chats in zip(prompts.values(), _read(checkpoint, prompts), strict=True):
        yield from zip(given, chats.predicting, strict=True)


def _read(checkpoint: Path, prompts: Mapping[tuple[int, ...], Sequence[Answer]]) -> list[Chats]:
    """Through the whole model, which is gone then."""
    model = LlamaByLayers(checkpoint)
    chats = [
        Chats(model.embed(prompt), [model.embed(each.answer[:-1]) for each in given])
        for prompt, given in prompts.items()
    ]
    model.read(chats, lambda layer: print(f"layer {layer + 1} of {model.layers}", flush=True))
    return chats


def main() -> None:
    """Do it; progress goes to standard output, a line a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--earlier", type=Path)
    options = parser.parse_args()
    earlier = Pack.read(options.earlier) if options.earlier else None
    write_truth(Pack.read(options.pack), options.checkpoint, options.folder, earlier)


if __name__ == "__main__":
    main()
