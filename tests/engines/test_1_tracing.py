"""A request's trace, from its caller's through the gateway's to that of the engine which answered it."""

import secrets

import httpx
import pytest

from tests.collector import Collector, Span
from tests.engines.conftest import MODEL, Server

PARENT = "b7ad6b7169203331"
MARK = "quetzal"
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": MARK}], "max_tokens": 4},
    "/v1/completions": {"prompt": MARK, "max_tokens": 4},
    "/v1/responses": {"input": MARK, "max_output_tokens": 4},
}


def asked(assay: Server, path: str, *, sampled: bool = True, stream: bool = False) -> str:
    """The trace that was continued."""
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-0{int(sampled)}", "x-request-id": f"of-{trace_id}"}
    body = {"model": f"{MODEL}-Lite", "stream": stream, **PATHS[path]}
    answer = httpx.post(f"{assay.url}{path}", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return trace_id


@pytest.mark.timeout(120)
def test_an_engines_span_continues_that_of_the_gateway(assay: Server, collector: Collector) -> None:
    unkept = asked(assay, "/v1/completions", sampled=False)
    for path, trace_id in {path: asked(assay, path, stream=path != "/v1/completions") for path in PATHS}.items():

        def of(name: str, trace_id: str = trace_id) -> Span:
            return collector.wait_for(lambda span: (span.trace_id, span.name) == (trace_id, name))

        operation = "text_completion" if path == "/v1/completions" else "chat"
        engine, attempt, gateway = of("llm_request"), of("POST"), of(f"{operation} {MODEL}-Lite")
        assert (engine.parent, attempt.parent, gateway.parent) == (attempt.span_id, gateway.span_id, PARENT)
        assert (gateway.resource["service.name"], engine.resource["service.name"]) == (
            "assay-gateway",
            "assay-engine",
        )
        assert engine.resource["assay.tier"] == f"{MODEL}-Lite"
        counted = gateway.attributes["gen_ai.usage.input_tokens"], gateway.attributes["gen_ai.usage.output_tokens"]
        assert counted == (
            engine.attributes["gen_ai.usage.prompt_tokens"],
            engine.attributes["gen_ai.usage.completion_tokens"],
        )
    assert not [span for span in collector.spans if span.trace_id == unkept], "as its caller decided"


def test_no_engine_begins_a_trace_or_tells_of_a_prompt(assay: Server, collector: Collector) -> None:
    assert [span for span in collector.named("llm_request") if not span.parent] == []
    assert MARK.encode() not in b"".join(collector.bodies)
