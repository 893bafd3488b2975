"""A caller gets the precision it insists on, or an error; a tier that computes something else is not served."""

import json

import pytest
from aiohttp import web

from server.engines.failures import EngineNotStarted, PrecisionRefused
from server.engines.keeper import keep
from server.engines.state import State
from tests.server.conftest import Gateway
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading
from tiers.precision import BF16, FP8
from tiers.probe.reading import READING_ROUTE, EngineReading

REFERENCE = b'"model":"SmolLM2-135M-Instruct"'


def says(gateway: Gateway, *readings: EngineReading) -> None:
    """Make the engine say this of itself, and that it runs the tier's checkpoint, and answer any request."""
    checkpoint = {"checkpoint": gateway.replica.manifest.digest}

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == READING_ROUTE:
            return web.json_response([each.model_dump(mode="json") | checkpoint for each in readings])
        return web.json_response({"id": "x"})

    gateway.handler = handler


async def test_a_pin_that_holds_is_answered_and_never_reaches_the_engine(gateway: Gateway) -> None:
    says(gateway)
    body = b"{" + REFERENCE + b', "precision":"bf16", "temperature":0.10, "x":{"precision":"fp8"}}'
    assert (await gateway.post(body)).status == 200
    (sent,) = gateway.bodies
    assert json.loads(sent) == {"model": "SmolLM2-135M-Instruct", "temperature": 0.1, "x": {"precision": "fp8"}}
    assert b"0.10" in sent, "the other fields keep their bytes"


@pytest.mark.parametrize("pin", ["fp8", "int4", "BF16", "fp64", ""])
async def test_a_pin_that_does_not_hold_is_an_error_and_no_other_tier_answers(gateway: Gateway, pin: str) -> None:
    says(gateway)
    answer = await gateway.post(b"{" + REFERENCE + b', "precision":"' + pin.encode() + b'"}')
    error = answer.error
    assert (answer.status, error["code"], error["param"]) == (400, "precision_not_available", "precision")
    assert "computes in bf16" in error["message"]
    assert gateway.seen == []


async def test_null_is_no_pin_and_a_number_is_refused(gateway: Gateway) -> None:
    says(gateway)
    assert (await gateway.post(b"{" + REFERENCE + b', "precision":null}')).status == 200
    assert gateway.bodies == [b"{" + REFERENCE + b"}"]
    assert (await gateway.post(b"{" + REFERENCE + b', "precision":16}')).status == 400


@pytest.mark.parametrize("rest", [b'"\xff": 1', b'"x": ' + b"[" * 100_000])
async def test_a_pin_in_a_body_that_cannot_be_read_is_refused(gateway: Gateway, rest: bytes) -> None:
    says(gateway)
    answer = await gateway.post(b"{" + REFERENCE + b', "precision":"bf16", ' + rest + b"}")
    assert answer.status == 400
    assert "cannot be read" in answer.error["message"]
    assert gateway.seen == []


async def test_a_pin_given_twice_is_removed_twice(gateway: Gateway) -> None:
    """The last one counts, as for every JSON reader, and the engine sees neither."""
    says(gateway)
    twice = b"{" + REFERENCE + b', "precision":"fp8", "precision":"bf16"}'
    assert (await gateway.post(twice)).status == 200
    assert gateway.bodies == [b"{" + REFERENCE + b"}"]


async def test_an_engine_that_computes_something_else_is_not_served_and_says_why(gateway: Gateway) -> None:
    says(gateway, reading(FP8))
    with pytest.raises(PrecisionRefused, match="weights: declared BF16, and 120 of 120 run FP8 E4M3") as refusal:
        await gateway.read_back(SMOL)
    gateway.replica.refuse()
    assert "SmolLM2-135M-Instruct-Reference is not served" in str(refusal.value)
    answer = await gateway.post()
    assert answer.status == 503
    assert answer.error["code"] == "tier_not_verified"
    assert "declared BF16" in answer.error["message"]
    assert "retry-after" not in answer.headers, "trying again does not help"
    shown = await gateway.post(b"", path="/v1/tiers/SmolLM2-135M-Instruct", method="GET")
    tier = json.loads(shown.body)
    assert tier["state"] == "refused"
    assert tier["verified"]["agrees"] is False
    assert (tier["declared"]["weights"]["text"], tier["verified"]["weights"]["type"]) == ("BF16", "fp8_e4m3")
    assert gateway.metric("assay_tier_verified") == gateway.metric("assay_tier_ready") == 0


async def test_an_engine_that_computes_what_is_declared_is_shown_as_verified(gateway: Gateway) -> None:
    says(gateway, reading(BF16))
    await gateway.read_back(SMOL)
    assert gateway.replica.verified is not None
    assert gateway.replica.verified.agrees
    assert gateway.metric("assay_tier_verified") == 1


async def test_an_engine_that_does_not_say_what_it_computes_is_not_started(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response([{"rank": 0}])

    gateway.handler = handler
    with pytest.raises(EngineNotStarted, match="not understood"):
        await gateway.read_back(SMOL)


async def test_a_refused_tier_is_not_started_again(gateway: Gateway) -> None:
    gateway.replica.refuse()
    assert gateway.replica.state is State.REFUSED
    await keep(gateway.replica)
    assert gateway.replica.restarts == 0
