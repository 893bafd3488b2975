"""`assay plan`: what each tier takes, before anything is downloaded."""

from dataclasses import replace
from typing import Annotated

import typer
from rich.markup import escape

from server.backend import machine_of
from server.commands.console import ConfigOption, JsonOption, out
from server.commands.tables import plan_table, show
from server.config_file import load_config
from server.model_config import ModelConfig
from tiers.catalog import CATALOG, find_member
from tiers.errors import ConfigError
from tiers.hardware import CARDS, NODE_GPUS, Machine, find_card
from tiers.placement import alone, together


def _model_names(incomplete: str) -> list[str]:
    return [member.name for member in CATALOG if member.name.lower().startswith(incomplete.lower())]


def _card_names(incomplete: str) -> list[str]:
    return [card.name for card in CARDS if card.name.lower().startswith(incomplete.lower())]


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model of the catalog, such as Llama-3.1-70B-Instruct, each of its tiers with the machine to "
            "itself; without one, the config's tiers, all together as `serve` would start them.",
            autocompletion=_model_names,
        ),
    ] = None,
    config: ConfigOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="A card, such as H100, instead of this machine's.", autocompletion=_card_names),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help=f"Cards in a node; {NODE_GPUS} by default.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes that a pipeline may go over, and tiers of launch: ray.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt and answer together, instead of the config's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each tier takes, over how many GPUs, and how many requests fit; or why not, and what would.

    Exits with 1 if a tier does not fit. Nothing is downloaded, built or started. All but weights and KV cache are
    estimates.

    Example: assay plan Llama-3.1-405B-Instruct --gpu H100 --count 8
    """
    settings = load_config(config)
    if gpu:
        machine = Machine.of(find_card(gpu), count or NODE_GPUS, nodes or 1)
    elif count or nodes:
        raise ConfigError("--count and --nodes are of a card: name it with --gpu.")
    else:
        machine = machine_of(settings)
    member = find_member(model) if model else None
    if member:
        entry = ModelConfig(name=member.name, source=member.ids[0])
        settings = settings.model_copy(update={"models": (entry,)})
    elif not settings.tiers_started:
        raise ConfigError("Every tier of this config is of launch: url, and takes nothing of a machine here.")
    tiers = tuple(replace(tier, context_length=context or tier.context_length) for tier in settings.tiers_started)
    planned = alone(tiers, machine) if member else together(tiers, machine)
    if as_json:
        out.print_json(planned.model_dump_json())
    else:
        if member:
            size = f"{member.shape.parameters / 1e9:.1f} billion parameters"
            out.print(f"{member.name}: {size}, {member.licence} ({member.licence_url})", soft_wrap=True)
        out.print(f"On {planned.machine}, {'each tier by itself' if member else 'all tiers together'}:")
        show(plan_table(planned.tiers))
        for problem in planned.problems:
            out.print(f"\n[red]does not fit[/]  {escape(problem)}", soft_wrap=True)
    if planned.problems:
        raise typer.Exit(1)
