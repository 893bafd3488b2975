"""What `assay certify --self-test` prints, and its exit code."""

import asyncio
import json
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from server.commands.console import err, out
from server.commands.tables import show, table
from server.config import Config
from server.measuring.self_test import GOOD, REPEATS, Trial, self_test
from server.progress import Steps


def self_test_command(config: Config, *, repeats: int = REPEATS, as_json: bool = False) -> int:
    """Run it and print what came of it; 0 if every fault was caught and no alarm was false, else 1.

    Raises:
        AssayError: an engine cannot be started, measured or broken.
    """
    with Steps(err) as steps:
        trials = asyncio.run(self_test(config, steps, repeats=repeats))
    if as_json:
        out.print_json(json.dumps([trial.model_dump() for trial in trials]))
    else:
        show(trials_table(trials))
    return 0 if all(trial.outcome in GOOD for trial in trials) else 1


def trials_table(trials: Sequence[Trial]) -> Table:
    """A line a trial."""
    made = table("tier", "fault", "what is planted", "outcome", "by", "after tokens", "times", "p")
    for column in made.columns[5:]:
        column.justify = "right"
    for trial in trials:
        colour = {"not applicable": "dim"}.get(trial.outcome, "green" if trial.outcome in GOOD else "red")
        made.add_row(
            trial.tier,
            trial.name,
            escape(trial.planted),
            f"[{colour}]{trial.outcome}[/]",
            " in ".join(part for part in (trial.metric, trial.phase) if part),
            "" if trial.tokens is None else f"{trial.tokens:,}",
            "" if trial.factor is None else f"{trial.factor:.2f}",
            "" if trial.p_value is None else f"{trial.p_value:.0e}",
        )
    return made
