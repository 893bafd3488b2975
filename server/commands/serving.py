"""What `assay serve` and `assay gateway` do alike: a gateway in the foreground, and its greeting.

Imported only by a command that serves: a web framework and an HTTP client come with it.
"""

import json

import uvloop
from rich.markup import escape

from server.commands.console import err, out, say_ready
from server.commands.tables import show, table
from server.config import Config
from server.engines.fleet import Fleet
from server.keys import Keys
from server.logs import writes_json
from server.progress import Steps
from server.serve import serve


def serve_here(config: Config, *, build: bool) -> None:
    """Serve until it is asked to stop; ``build`` is whether checkpoints that are missing may be built."""
    steps = Steps(err)

    def announce(fleet: Fleet, url: str, keys: Keys) -> None:
        steps.close()
        welcome(fleet, url, with_keys=keys.required)

    with steps:
        uvloop.run(serve(config, steps, announce, build=build))


def welcome(fleet: Fleet, url: str, *, with_keys: bool) -> None:
    """Which names are served and which are not, to whom, and a command to try."""
    if writes_json():
        names = {pool.tier.name: pool.can_answer for pool in fleet.pools}
        say_ready(url, "", tiers=names, asks_for_keys=with_keys)
        return
    rows = table("model name", "precision", "recipe", "checkpoint", "verified")
    for pool in fleet.pools:
        manifest = pool.manifest
        state = "[green]yes[/]" if pool.can_answer else "[red]no: not served[/]"
        for name in pool.tier.names:
            rows.add_row(name, manifest.precision.name, manifest.recipe, manifest.short_digest, state)
    show(rows)
    every = [pool.tier for pool in fleet.pools]
    served = [pool.tier for pool in fleet.pools if pool.can_answer] or every  # all may have died just now
    first_model = [tier for tier in served if tier.model == served[0].model]
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    body = {
        "model": first_model[-1].name,
        "messages": question,
        "max_tokens": 40,
    }  # on a CPU a whole one may take minutes
    if with_keys:
        who = "Callers need a key: `assay keys add NAME` makes one. The command below has it in ASSAY_API_KEY."
    else:
        who = "No keys: whoever is on this machine may call. `assay keys add NAME` makes one."
    out.print(f"\n{who}", soft_wrap=True)
    out.print(f"\n[green]ready[/] on {url}. Try:\n")
    key = ' -H "authorization: Bearer $ASSAY_API_KEY"' if with_keys else ""
    curl = f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{json.dumps(body)}'"
    out.print(escape(curl), soft_wrap=True)
