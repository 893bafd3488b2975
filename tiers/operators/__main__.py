"""``python -m tiers.operators CHECKPOINT``: holds the operators of this machine's vLLM to their definitions.

Standard output is JSON, a line an event: ``{"step": …}`` while it works, ``{"finding": …}`` for what it found.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tiers.operators.bench import Bench, Check, Planting
from tiers.operators.findings import Finding
from tiers.operators.inputs import LLAMA_8B, Inputs, Shape, capture, drawn_like
from tiers.operators.judgement import Absent, judge
from tiers.operators.listing import OPERATORS, PLANTS, Operator, operator_names
from tiers.operators.planting import planting

Say = Callable[[str], None]


def checks(only: Sequence[str] = ()) -> list[tuple[Operator, Check]]:
    """The operators that are asked for, with the functions that run them."""
    chosen = [operator for operator in OPERATORS if not only or operator.name in only]
    return [
        (each, getattr(importlib.import_module(f"tiers.operators.{each.module}"), each.name.replace("-", "_")))
        for each in chosen
    ]


def findings(
    inputs: Inputs, only: Sequence[str] = (), plant: Planting | None = None, say: Say = lambda what: None
) -> Iterator[Finding]:
    """What is found of each operator on one shape."""
    bench = Bench(inputs, plant)
    for operator, check in checks(only):
        say(f"{inputs.shape.name}: {operator.name}")
        for case in check(bench):
            if isinstance(case, Absent):
                yield Finding(operator=operator.name, outcome="absent", kernel=case.kernel, reason=case.reason)
            else:
                yield judge(operator.name, inputs.shape.name, case)


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the reference's")
    parser.add_argument("--only", action="append", default=[], choices=operator_names())
    parser.add_argument("--plant", choices=[plant.name for plant in PLANTS])
    parser.add_argument("--own-widths", action="store_true", help="not those of Llama-3.1-8B too")
    options = parser.parse_args()
    events, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # what vLLM prints is no event

    def tell(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    say = partial(_say, tell)
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # type: ignore[no-untyped-call]  # as every process of an engine does: Assay's kernel
    say("real activations, with Transformers")
    real = capture(options.checkpoint)
    shapes: list[Callable[[], Inputs]] = [lambda: real]
    if not options.own_widths:
        shapes.append(lambda: drawn_like(real, Shape("Llama-3.1-8B", LLAMA_8B)))
    only = options.only or [plant.operator for plant in PLANTS if plant.name == options.plant]
    absent: set[str] = set()
    for inputs in shapes:
        for found in findings(inputs(), only, planting(options.plant), say):
            if found.outcome == "absent" and found.operator in absent:
                continue
            absent |= {found.operator} if found.outcome == "absent" else set()
            tell(finding=json.loads(found.model_dump_json()))


def _say(tell: Callable[..., None], step: str) -> None:
    tell(step=step)


if __name__ == "__main__":
    main()
