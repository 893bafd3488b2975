"""What Prometheus sees of the gateway and of an engine: all that dashboard, rules and autoscalers ask for."""

import urllib.request

from server.engines.address import Address
from tests.deploy import asked
from tests.deploy.asked import Scrape
from tests.engines.conftest import MODEL, Server


def engine_metrics(assay: Server, tier: str) -> str:
    """An engine's own, which it tells to who has its key."""
    address = Address.read(assay.log.parent / "engines" / f"{MODEL}-{tier}.json".lower())
    assert address is not None
    request = urllib.request.Request(f"{address.url}/metrics", headers={"Authorization": f"Bearer {address.key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def stream(assay: Server, tier: str) -> None:
    chunks = assay.client().chat.completions.create(
        model=f"{MODEL}-{tier}",
        messages=[{"role": "user", "content": "Count to five."}],
        max_tokens=8,
        stream=True,
    )
    assert list(chunks)


def test_every_series_and_label_that_anything_asks_for_is_in_a_real_scrape(assay: Server) -> None:
    stream(assay, "Lite")
    # Told when they happen: an engine that wakes, a connection without a request.
    seldom = ("assay_wake_seconds", "assay_connections_refused")
    ours = {each for each in asked.asked_by_all(asked.OURS) if not each.name.startswith(seldom)}
    engines = asked.asked_by_all(asked.ENGINES)
    assert len(ours) > 20
    assert len(engines) > 5
    assert Scrape(assay.get("/metrics")).missing(ours) == []
    assert Scrape(engine_metrics(assay, "Lite")).missing(engines) == []


def test_an_engine_calls_its_model_by_the_first_of_its_tiers_names(assay: Server) -> None:
    for tier, name in (("Lite", f"{MODEL}-Lite"), ("Reference", MODEL)):
        assert f'vllm:num_requests_waiting{{engine="0",model_name="{name}"}}' in engine_metrics(assay, tier)


def test_a_real_stream_is_counted_with_its_pace(assay: Server) -> None:
    def told() -> dict[str, float]:
        names = (
            "gen_ai_server_time_to_first_token_seconds_count",
            "gen_ai_server_time_per_output_token_seconds_count",
            "gen_ai_server_time_per_output_token_seconds_sum",
            "gen_ai_client_token_usage_sum",
        )
        return {name: assay.told(name, "Lite") for name in names}

    before = told()
    stream(assay, "Lite")
    first, paces, pace, tokens = (now - was for now, was in zip(told().values(), before.values(), strict=True))
    assert (first, paces) == (1, 1)
    assert 0 < pace < 5
    assert tokens > 8
