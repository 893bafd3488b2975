"""Speed, size and divergence of each tier of a running server, side by side, from one run.

usage: python -m tests.bench.tiers [--url URL] [--model NAME] [--quick] [--json]

Speed is of one request at a time and of four at once, each a fixed number of tokens. Divergence is a lower
bound of KL(Reference ‖ tier) over the reference's own answers, from the 20 likeliest tokens that the public
API gives and the rest as one outcome (kernels.divergence.kl_lower_bound), with a 95% bootstrap over prompts.
"""

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import torch
from rich.console import Console
from rich.table import Table

from kernels.divergence import kl_lower_bound
from server.progress import Steps
from tests.bench.bootstrap import interval

PROMPTS = (
    "What causes the tides?",
    "Write a limerick about a programmer.",
    "Explain what an API is to my grandmother.",
    "What is 23 plus 58, and how did you get there?",
    "Name three differences between cats and dogs.",
    "Write a Python function that reverses a list.",
    "Why do leaves change color in autumn?",
    "Describe the city of Venice in two sentences.",
    "How do I boil an egg?",
    "What is the difference between speed and velocity?",
    "Give me a slogan for a bakery.",
    "Who wrote Don Quixote, and what is it about?",
    "What should I pack for a week in the mountains?",
    "Explain how a bicycle stays upright.",
    "Write a short thank-you note to a teacher.",
    "What is a black hole?",
)
TOKENS = 96
REPEATS = 3
TOP = 20
KEY = os.environ.get("ASSAY_API_KEY", "unused")
"""As `assay tiers` takes it."""

Logprobs = list[dict[str, float]]


class Bench:
    """One server, asked through the official client."""

    def __init__(self, url: str, model: str, *, quick: bool) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600)
        self._model = model
        self._prompts = PROMPTS[:2] if quick else PROMPTS
        self._tokens = TOKENS // 8 if quick else TOKENS

    def answers(self) -> list[tuple[Any, int]]:
        """The reference's greedy answer to every prompt as messages, and how many tokens the question takes."""

        def answer(prompt: str) -> tuple[Any, int]:
            question = {"role": "user", "content": prompt}
            reply = self._chat(self._model, [question], max_tokens=self._tokens, temperature=0)
            answered = {"role": "assistant", "content": reply.choices[0].message.content}
            return [question, answered], reply.usage.prompt_tokens

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(answer, self._prompts))

    def score(self, name: str, messages: Any, start: int) -> Logprobs:
        """The likeliest tokens of a tier at every position of an answer, by token id."""
        reply = self._chat(
            name,
            messages,
            max_tokens=1,
            extra_body={"prompt_logprobs": TOP, "add_generation_prompt": False},
        )
        return [{token: e["logprob"] for token, e in row.items()} for row in reply.prompt_logprobs[start:]]

    def speed(self, name: str) -> tuple[float, float, float]:
        """Milliseconds to the first token, tokens per second of one request, and of four at once together."""
        firsts, rates = zip(*(self._generate(name) for _ in range(REPEATS)), strict=True)
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: self._generate(name), range(4)))
        together = 4 * self._tokens / (time.monotonic() - began)
        return statistics.median(firsts) * 1e3, statistics.median(rates), together

    def _generate(self, name: str) -> tuple[float, float]:
        began = time.monotonic()
        stream = self._client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": f"Tell me a story. {time.monotonic_ns()}"}],
            max_tokens=self._tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        times = [time.monotonic() for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
        return times[0] - began, (len(times) - 1) / (times[-1] - times[0])

    def _chat(self, name: str, messages: Any, **options: Any) -> Any:
        return self._client.chat.completions.create(model=name, messages=messages, **options)


def kl_by_prompt(reference: list[Logprobs], tier: list[Logprobs]) -> list[torch.Tensor]:
    """The bound at every position, a tensor a prompt, over the tokens that both sides named."""
    return [
        torch.cat([_kl(p, q) for p, q in zip(*pair, strict=True)]) for pair in zip(reference, tier, strict=True)
    ]


def _kl(p: dict[str, float], q: dict[str, float]) -> torch.Tensor:
    shared = sorted(p.keys() & q.keys())
    return kl_lower_bound(torch.tensor([[p[t] for t in shared]]), torch.tensor([[q[t] for t in shared]]))


def same_top(reference: list[Logprobs], tier: list[Logprobs]) -> float:
    """How often both sides rank the same token first."""
    pairs = [pair for prompt in zip(reference, tier, strict=True) for pair in zip(*prompt, strict=True)]
    return statistics.fmean(max(p, key=p.__getitem__) == max(q, key=q.__getitem__) for p, q in pairs)


def measure(url: str, model: str | None, *, quick: bool) -> list[dict[str, Any]]:
    """One row a tier."""
    tiers = openai.OpenAI(base_url=url, api_key=KEY).get("/v1/tiers", cast_to=object)
    assert isinstance(tiers, dict)
    model = model or tiers["data"][0]["model"]
    rows = [tier for tier in tiers["data"] if tier["model"] == model]
    bench = Bench(url, model, quick=quick)
    with Steps() as steps:
        with steps.step("the reference answers"):
            answered = bench.answers()
        scores: dict[str, list[Logprobs]] = {}
        speeds = {}
        for tier in rows:
            with steps.step(f"{tier['id']}: scoring"):
                scores[tier["id"]] = [bench.score(tier["id"], *each) for each in answered]
            with steps.step(f"{tier['id']}: speed"):
                speeds[tier["id"]] = bench.speed(tier["id"])
    reference = scores[rows[0]["id"]]
    table = []
    for tier in rows:
        by_prompt = kl_by_prompt(reference, scores[tier["id"]])
        first_ms, alone, four = speeds[tier["id"]]
        table.append(
            {
                "tier": tier["tier"],
                "precision": tier["precision"],
                "size_mb": tier["checkpoint"]["size_bytes"] / 1e6,
                "first_token_ms": first_ms,
                "tokens_per_s": alone,
                "tokens_per_s_of_4": four,
                "kl_at_least": torch.cat(by_prompt).mean().item(),
                "kl_interval": interval(by_prompt),
                "top1_agreement": same_top(reference, scores[tier["id"]]),
                "prompts": len(by_prompt),
                "tokens_scored": sum(map(len, by_prompt)),
            }
        )
    return table


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="a model name; the first one of the server by default")
    parser.add_argument("--quick", action="store_true", help="two short prompts: shows that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = measure(options.url, options.model, quick=options.quick)
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        return
    base = rows[0]
    table = Table(
        "tier", "precision", "size", "first token", "tokens/s", "4 at once", "KL ≥ (95%)", "top-1", box=None
    )
    for row in rows:
        low, high = row["kl_interval"]
        table.add_row(
            row["tier"],
            row["precision"],
            f"{row['size_mb']:.0f} MB",
            f"{row['first_token_ms']:.0f} ms",
            f"{row['tokens_per_s']:.1f} ({row['tokens_per_s'] / base['tokens_per_s']:.2f} ×)",
            f"{row['tokens_per_s_of_4']:.1f}",
            f"{row['kl_at_least']:.4f} ({low:.4f}–{high:.4f})",
            f"{row['top1_agreement']:.1%}",
        )
    Console(width=140).print(table)
    print(f"over {base['tokens_scored']} tokens of {base['prompts']} answers of the reference")


if __name__ == "__main__":
    main()
