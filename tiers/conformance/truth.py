"""The reference implementation's view of a pack's answers: Hugging Face Transformers, in FP32.

A program of its own, for the gateway holds no PyTorch: it reads a pack and writes another one of the same answers,
whose hidden states are those of Transformers.
"""

import argparse
import copy
import importlib.metadata
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kernels.head import likeliest
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
    with safe_open(at.file, framework="pt") as tensors:
        head = tensors.get_tensor(at.name)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompts: dict[tuple[int, ...], list[Answer]] = {}
    for answer in pack.answers[done:]:
        prompts.setdefault(tuple(answer.prompt), []).append(answer)
    for number, (prompt, answers) in enumerate(prompts.items(), 1):
        print(f"{number} of {len(prompts)} prompts", flush=True)
        read = model.model(torch.tensor([prompt]), use_cache=True)
        for answer in answers:
            hidden = read.last_hidden_state[0, -1:]
            if rest := answer.answer[:-1]:
                cache = copy.deepcopy(read.past_key_values)  # it grows with what is read
                further = model.model(torch.tensor([rest]), past_key_values=cache, use_cache=True)
                hidden = torch.cat([hidden, further.last_hidden_state[0]])
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


def main() -> None:
    """Do it; progress goes to standard output, a line a prompt."""
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
