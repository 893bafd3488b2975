"""Every recipe tried for the embedded model, side by side: divergence, bits and size, built and measured anew.

usage: make bench-recipes ARGS="[--only NAME ...] [--quick] [--json]"

Runs in the quantization environment. The reference is FP32 arithmetic over the BF16 weights; a candidate
computes in BF16 with its weights rounded and, for FP8, its activations rounded per token, by compressed-
tensors' own forward pass, as vLLM does. KL(reference ‖ candidate) is exact, over the whole vocabulary, on the
reference's own answers to the prompts below, none of which is a calibration prompt; its interval is a 95%
bootstrap over prompts. Bits are those on disk per weight of the linear layers, scales and zero points included.
A row takes from seconds to six minutes on two cores, the whole table an hour or more.
"""

import argparse
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.divergence import compare
from kernels.head import Projected
from server.progress import Steps
from tests.bench.bootstrap import interval
from tiers.build import BuildRequest, build, quantize
from tiers.calibration import PROMPTS as CALIBRATION_PROMPTS
from tiers.calibration import CalibrationText, Conversation, answered_prompts
from tiers.catalog import ModelShape
from tiers.source import EMBEDDED_MODEL, EMBEDDED_PACKAGE, Source
from tiers.weights import bits_per_weight

SEED = 7
PROMPTS = (
    "Why does bread rise in the oven?",
    "Write a four-line poem about rain on a tin roof.",
    "What is 45 percent of 220?",
    "Explain to a beginner what a variable is in programming.",
    "List four ways to save water at home.",
    "Who was Leonardo da Vinci?",
    "Write a JavaScript function that returns the largest number in an array.",
    "What is the difference between a star and a planet?",
    "Give me a packing list for a beach holiday.",
    "How does a microwave oven heat food?",
    "Write a short apology to a neighbour for loud music.",
    "Translate into Spanish: Where is the nearest pharmacy?",
    "What causes earthquakes?",
    "Describe the taste of a lemon to someone who never ate one.",
    "Tell me a bedtime story about a fox who is afraid of the dark.",
    "What are the advantages of electric cars?",
    "How many minutes are there in three days? Explain.",
    "Summarize the plot of Hamlet in a few sentences.",
    "Write a Python function that checks whether a word is a palindrome.",
    "What did the ancient Egyptians believe about the afterlife?",
    "Suggest names for a small coffee shop near a harbour.",
    "How do I remove a red wine stain from a carpet?",
    "Explain what an interest rate is.",
    "If it rains, the street is wet. The street is wet. Did it rain?",
    "What is the function of the heart?",
    "Write a dialogue between a customer and a waiter about a cold soup.",
    "Give three tips for a job interview.",
    "Why do cats purr?",
    "Write a SQL statement that counts customers per country.",
    "What is the theory of evolution?",
    "Correct the grammar: She don't likes when peoples is late.",
    "How do I plant tomatoes on a balcony?",
    "What is a black box in an airplane?",
    "Compare tea and coffee.",
    "Write an invitation to a birthday party for a six-year-old.",
    "What is the capital of Canada and how large is it?",
    "Explain the rules of football to someone from another planet.",
    "A box holds 12 eggs. How many boxes are needed for 150 eggs?",
    "What is the greenhouse effect?",
    "Write a limerick about an old sailor.",
    "How does a search engine work?",
    "What are good habits for studying?",
    "Describe a busy market in Marrakesh.",
    "What is the difference between HTTP and HTTPS?",
    "Who painted the Mona Lisa and where can it be seen?",
    "Write a HTML page with a heading and a list of three fruits.",
    "What should I do when I get lost while hiking?",
    "Explain what gravity is in two paragraphs.",
)

STAGE = "default_stage", "default_modifiers"
HEAD = {"targets": ["Linear"], "ignore": ["lm_head"]}
GPTQ = {"dampening_frac": 0.01, "actorder": "static"}
PER_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True, eq=False)
class Candidate:
    """One row: llm-compressor's modifiers in order, whether they calibrate, and what follows."""

    name: str
    modifiers: dict[str, dict[str, Any]]
    calibrates: bool = True

    @property
    def text(self) -> str:
        """The recipe as llm-compressor reads it."""
        return yaml.safe_dump({STAGE[0]: {STAGE[1]: self.modifiers}}, sort_keys=False)


def int4(group_size: int, symmetric: bool, **further: Any) -> dict[str, Any]:
    """INT4 weights in groups for all linear layers but the head."""
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    return HEAD | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | further}}}


def fp8(**further: Any) -> dict[str, Any]:
    """FP8 weights a channel and FP8 activations a token for all linear layers but the head."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"} | further
    return HEAD | {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": PER_TOKEN}}
    }


MSE, IMATRIX = {"observer": "memoryless_mse"}, {"observer": "imatrix_mse"}
SMOOTH = {"smoothing_strength": 0.5, "ignore": ["lm_head"]}
AWQ = {"duo_scaling": "both"}
EMPTY: dict[str, Any] = {}

CANDIDATES = (
    # Rounding alone: group size, zero points, ranges chosen for the least squared error.
    *(
        Candidate(
            f"INT4 RTN g{size} {'sym' if symmetric else 'asym'}{' MSE' if further else ''}",
            {"QuantizationModifier": int4(size, symmetric, **further)},
            calibrates=False,
        )
        for size in (64, 32)
        for symmetric in (True, False)
        for further in (EMPTY, MSE)
    ),
    # Rounding that compensates its own errors.
    Candidate("INT4 GPTQ g64 sym, no order", {"GPTQModifier": int4(64, True) | GPTQ | {"actorder": None}}),
    *(
        Candidate(
            f"INT4 GPTQ g{size} {'sym' if symmetric else 'asym'}{' MSE' if further else ''}",
            {"GPTQModifier": int4(size, symmetric, **further) | GPTQ},
        )
        for size in (64, 32)
        for symmetric in (True, False)
        for further in (EMPTY, MSE)
    ),
    Candidate("INT4 GPTQ g32 asym iMatrix", {"GPTQModifier": int4(32, False, **IMATRIX) | GPTQ}),
    Candidate(
        "INT4 GPTQ g32 asym, damping 0.1", {"GPTQModifier": int4(32, False) | GPTQ | {"dampening_frac": 0.1}}
    ),
    # Scales moved between layers first.
    Candidate("INT4 AWQ g64 sym", {"AWQModifier": AWQ, "QuantizationModifier": int4(64, True)}),
    Candidate("INT4 AWQ g32 asym", {"AWQModifier": AWQ, "QuantizationModifier": int4(32, False)}),
    Candidate("INT4 AWQ + GPTQ g32 asym", {"AWQModifier": AWQ, "GPTQModifier": int4(32, False) | GPTQ}),
    Candidate(
        "INT4 SmoothQuant + GPTQ g32 asym", {"SmoothQuantModifier": SMOOTH, "GPTQModifier": int4(32, False) | GPTQ}
    ),
    # FP8.
    Candidate("FP8 dynamic", {"QuantizationModifier": fp8()}, calibrates=False),
    Candidate("FP8 dynamic MSE", {"QuantizationModifier": fp8(**MSE)}, calibrates=False),
    Candidate(
        "FP8 MLP only, layers 0 and 29 BF16",
        {
            "QuantizationModifier": {
                "targets": ["re:.*mlp[.](gate|up|down)_proj$"],
                "ignore": ["lm_head", "re:.*layers[.](0|29)[.].*"],
                "scheme": "FP8_DYNAMIC",
            }
        },
        calibrates=False,
    ),
    Candidate(
        "FP8 blocks of 128 × 128", {"QuantizationModifier": HEAD | {"scheme": "FP8_BLOCK"}}, calibrates=False
    ),
    Candidate("FP8 SmoothQuant", {"SmoothQuantModifier": SMOOTH, "QuantizationModifier": fp8()}),
    Candidate("FP8 GPTQ", {"GPTQModifier": fp8()}),
)


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate; ``problem`` says why there is nothing else."""

    recipe: str
    text: str
    bits_per_linear_weight: float = math.nan
    size_mb: float = math.nan
    kl: float = math.nan
    kl_interval: tuple[float, float] = (math.nan, math.nan)
    top1_agreement: float = math.nan
    perplexity: float = math.nan
    perplexity_of_reference: float = math.nan
    seconds: float = math.nan
    problem: str | None = None


class Bench:
    """The reference, what it was calibrated on, and what it answered."""

    def __init__(self, folder: Path, steps: Steps, prompts: Sequence[str]) -> None:
        self._folder = folder
        self._reference = folder / "reference"
        with steps.step("reference") as step:
            source = Source(kind="package", id=EMBEDDED_PACKAGE)
            request = BuildRequest(model=EMBEDDED_MODEL, recipe="bf16", source=source, target=self._reference)
            build(request, step.detail)
        self._shape = ModelShape.read(self._reference)
        self._tokenizer = AutoTokenizer.from_pretrained(self._reference)
        with steps.step("answers to the held-out prompts"):
            self._held_out = answered_prompts(self._model(), self._tokenizer, prompts, SEED).conversations
            exact = self._model().float()
            self._head = exact.get_output_embeddings().weight.detach()
            self._states = [_states(exact, each) for each in self._held_out]

    @cached_property
    def _calibration(self) -> CalibrationText:
        return answered_prompts(self._model(), self._tokenizer)

    def measure(self, candidate: Candidate, steps: Steps) -> Row:
        """Build and measure one candidate."""
        began = time.monotonic()
        with steps.step(candidate.name) as step:
            model = self._model()
            text: CalibrationText | None = self._calibration if candidate.calibrates else None
            try:
                quantize(model, candidate.text, text)
                seconds = time.monotonic() - began
                step.detail("measuring")
                measured = self._divergence(model)
            except (ValueError, RuntimeError) as error:  # a recipe that does not fit the model is a row as well
                return Row(candidate.name, candidate.text, problem=str(error).splitlines()[0])
            with tempfile.TemporaryDirectory(dir=self._folder) as target:
                model.save_pretrained(target, save_compressed=True)
                size = sum(file.stat().st_size for file in Path(target).glob("*.safetensors"))
                bits = bits_per_weight(Path(target), self._shape)
        gc.collect()
        return Row(
            candidate.name,
            candidate.text,
            bits_per_linear_weight=bits,
            size_mb=size / 1e6,
            seconds=seconds,
            **measured,
        )

    @torch.no_grad()
    def _divergence(self, model: Any) -> dict[str, Any]:
        kls, same, losses, reference_losses = [], [], [], []
        for states, each in zip(self._states, self._held_out, strict=True):
            answer = torch.tensor(each.tokens[each.answer_start :])
            found = compare(Projected(states, self._head), _states(model, each) @ self._head.T, answer)
            kls.append(found.kl)
            same.append((found.top_p == found.top_q).float())
            losses.append(-found.ln_q)
            reference_losses.append(-found.ln_p)
        return {
            "kl": torch.cat(kls).mean().item(),
            "kl_interval": interval(kls),
            "top1_agreement": torch.cat(same).mean().item(),
            "perplexity": torch.cat(losses).mean().exp().item(),
            "perplexity_of_reference": torch.cat(reference_losses).mean().exp().item(),
        }

    def _model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._reference, dtype=torch.bfloat16).eval()


@torch.no_grad()
def _states(model: Any, conversation: Conversation) -> torch.Tensor:
    """The final hidden states that predict the answer's tokens, [T, H], FP32."""
    states: torch.Tensor = model.model(torch.tensor([conversation.tokens]), use_cache=False).last_hidden_state[0]
    return states[conversation.answer_start - 1 : -1].float()


def show(rows: list[Row], results: TextIO) -> None:
    """Print the table."""
    table = Table("recipe", "bits", "size", "KL (95%)", "top-1", "perplexity", "seconds", box=None)
    for row in rows:
        if row.problem:
            table.add_row(row.recipe, "", "", row.problem)
            continue
        low, high = row.kl_interval
        table.add_row(
            row.recipe,
            f"{row.bits_per_linear_weight:.2f}",
            f"{row.size_mb:.0f} MB",
            f"{row.kl:.4f} ({low:.4f}–{high:.4f})",
            f"{row.top1_agreement:.1%}",
            f"{row.perplexity:.3f}",
            f"{row.seconds:.0f}",
        )
    Console(width=140, file=results).print(table)
    reference = next((row.perplexity_of_reference for row in rows if not row.problem), math.nan)
    perplexity = f"whose own perplexity on them is {reference:.3f}"
    print(f"over the answers of the reference, {perplexity}", file=results)


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="rows by name, in this order; * is anything")
    parser.add_argument("--quick", action="store_true", help="two prompts: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    assert not set(PROMPTS) & set(CALIBRATION_PROMPTS), "a held-out prompt is a calibration prompt"
    chosen = dict.fromkeys(each for only in options.only for each in CANDIDATES if fnmatch(each.name, only))
    rows: list[Row] = []
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    # An interrupted run shows what it has.
    with tempfile.TemporaryDirectory() as folder, Steps() as steps, suppress(KeyboardInterrupt):
        bench = Bench(Path(folder), steps, PROMPTS[:2] if options.quick else PROMPTS)
        for each in chosen:
            rows.append(row := bench.measure(each, steps))
            steps.console.print(row.problem or f"  KL {row.kl:.4f}, top-1 {row.top1_agreement:.1%}")
    if options.json:
        json.dump([asdict(row) for row in rows], results, indent=2)
    else:
        show(rows, results)
    results.close()


if __name__ == "__main__":
    main()
