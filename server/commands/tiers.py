"""`assay tiers`: the tiers of a server that runs, as it tells them."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from server.commands.console import JsonOption, fetch, out
from server.commands.tables import parts_table, show, tiers_table


def tiers(
    url: Annotated[str, typer.Option(envvar="ASSAY_URL", help="The running server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None,
        typer.Option(
            envvar="ASSAY_API_KEY",
            help="An API key, if the server asks for one. Better in the variable: others see a command's options.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the tiers of a running server: what each declares, what its engine was seen to compute, its state.

    Example: assay tiers --url http://127.0.0.1:8000 --json
    """
    answer = fetch(f"{url.rstrip('/')}/v1/tiers", key)
    if as_json:
        out.print_json(json.dumps(answer))
        return
    show(tiers_table(answer["data"]))
    out.print()
    show(parts_table(answer["data"]))
    for tier in answer["data"]:
        for problem in (tier["verified"] or {}).get("disagreements", ()):
            out.print(f"[red]{tier['id']}[/]: {escape(problem)}", soft_wrap=True)
