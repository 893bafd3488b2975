"""The published document, held against what is served here and against what vLLM takes."""

import ast
import importlib.util
import json
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jsonschema  # type: ignore[import-untyped]
import pytest
from aiohttp import web
from pydantic import BaseModel
from starlette.routing import Route

from server.call import FORBIDDEN
from server.errors import Refusal
from server.openai import PATHS
from server.openapi import chat, completions, parts, responses, tokens
from server.openapi.operations import OPERATIONS, Operation
from tests.server.conftest import Gateway, running_gateway
from tests.server.test_certificates import runs, save

Json = dict[str, Any]
CHAT, TEXT = "openai/chat_completion/protocol.py", "openai/completion/protocol.py"
RESPONSES, TOKENS, BASE = "openai/responses/protocol.py", "serve/tokenize/protocol.py", "generate/base/protocol.py"
VLLM_MODELS: dict[type[BaseModel], tuple[str, str]] = {
    chat.ChatCompletionRequest: (CHAT, "ChatCompletionRequest"),
    chat.ChatCompletion: (CHAT, "ChatCompletionResponse"),
    chat.ChatChoice: (CHAT, "ChatCompletionResponseChoice"),
    chat.ChatMessage: (CHAT, "ChatMessage"),
    chat.ChatLogprobs: (CHAT, "ChatCompletionLogProbs"),
    chat.ContentLogprob: (CHAT, "ChatCompletionLogProbsContent"),
    chat.ChatCompletionChunk: (CHAT, "ChatCompletionStreamResponse"),
    chat.ChatChunkChoice: (CHAT, "ChatCompletionResponseStreamChoice"),
    chat.Tool: (CHAT, "ChatCompletionToolsParam"),
    chat.NamedTool: (CHAT, "ChatCompletionNamedToolChoiceParam"),
    chat.Function: (BASE, "FunctionDefinition"),
    chat.ChatDelta: (BASE, "DeltaMessage"),
    chat.ToolCall: (BASE, "ToolCall"),
    chat.ToolCallDelta: (BASE, "DeltaToolCall"),
    parts.StreamOptions: (BASE, "StreamOptions"),
    parts.ResponseFormat: (BASE, "ResponseFormat"),
    completions.CompletionRequest: (TEXT, "CompletionRequest"),
    completions.Completion: (TEXT, "CompletionResponse"),
    completions.CompletionChoice: (TEXT, "CompletionResponseChoice"),
    completions.CompletionLogprobs: (TEXT, "CompletionLogProbs"),
    completions.CompletionChunk: (TEXT, "CompletionStreamResponse"),
    responses.ResponseRequest: (RESPONSES, "ResponsesRequest"),
    responses.Response: (RESPONSES, "ResponsesResponse"),
    responses.ResponseUsage: (RESPONSES, "ResponseUsage"),
    tokens.TokenizeText: (TOKENS, "TokenizeCompletionRequest"),
    tokens.TokenizeChat: (TOKENS, "TokenizeChatRequest"),
    tokens.Tokens: (TOKENS, "TokenizeResponse"),
    tokens.DetokenizeRequest: (TOKENS, "DetokenizeRequest"),
    tokens.Detokenized: (TOKENS, "DetokenizeResponse"),
    parts.Usage: ("serve/engine/protocol.py", "UsageInfo"),
    parts.StructuredOutputs: ("../sampling_params.py", "StructuredOutputsParams"),
    parts.RepetitionDetection: ("../sampling_params.py", "RepetitionDetectionParams"),
}
OURS = {"precision", "error"}
"""The field that Assay adds to requests, and the one of OpenAI's that it adds to a response."""


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    home = tmp_path_factory.mktemp("gateway")
    async with running_gateway(home) as made:

        async def answers(request: web.Request) -> web.Response:
            return web.Response(body=b'{"choices":[]}', content_type="application/json")

        made.handler = answers
        runs(made.replica)
        save(home, made.replica)
        yield made


@pytest.fixture(scope="module")
async def document(served: Gateway) -> Json:
    answer = await served.post(b"", path="/openapi.json", method="GET")
    assert answer.status == 200
    told: Json = json.loads(answer.body)
    return told


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


@cache
def classes_of_vllm(file: str) -> dict[str, ast.ClassDef]:
    """Read from its source: importing vLLM would take seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "entrypoints" / file).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def fields_of_vllm(file: str, name: str) -> frozenset[str]:
    """The fields of one of vLLM's models."""
    classes = classes_of_vllm(file)
    fields = {
        node.target.id
        for node in classes[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= fields_of_vllm(file, base.id)
    assert fields, name
    return frozenset(fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def all_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in models_in(field.annotation):
            yield from all_models(part)


DOCUMENTED = {
    model
    for operation in OPERATIONS
    for top in (*operation.requests, operation.answer, operation.event)
    if top is not None
    for model in all_models(top)
}


def test_it_is_valid(document: Json) -> None:
    import schemathesis

    schemathesis.openapi.from_dict(document).validate()
    assert document["openapi"].startswith("3.1")


@pytest.mark.parametrize("model", VLLM_MODELS, ids=lambda model: model.__name__)
def test_every_documented_field_is_vllms(model: type[BaseModel]) -> None:
    assert model in DOCUMENTED
    documented = {field.alias or name for name, field in model.model_fields.items()} - OURS
    assert documented <= fields_of_vllm(*VLLM_MODELS[model])


def test_every_path_is_told_whole() -> None:
    assert [operation.path for operation in OPERATIONS] == [path.path for path in PATHS]
    tops = {model for operation in OPERATIONS for model in (*operation.requests, operation.answer)}
    assert tops <= VLLM_MODELS.keys()
    for operation, path in zip(OPERATIONS, PATHS, strict=True):
        assert (operation.event is None) == (path.events is None), "it streams, or it does not"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_nothing_forbidden_is_documented(operation: Operation) -> None:
    for model in operation.requests:
        assert not set(FORBIDDEN) & model.model_fields.keys()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_every_field_that_the_gateway_reads_is_documented(operation: Operation, document: Json) -> None:
    kind = next(path.kind for path in PATHS if path.path == operation.path)
    names = {name for model in operation.requests for name in model.model_fields}
    known = {name for model in operation.requests for name in fields_of_vllm(*VLLM_MODELS[model])}
    read = {name for name in kind.__struct_fields__ if name in known | OURS} - set(FORBIDDEN)
    assert read <= names | set(operation.refused)
    assert not names & set(operation.refused)
    description = document["paths"][operation.path]["post"]["description"]
    assert all(f"`{name}`" in description for name in operation.refused)


def test_what_is_refused_is_named(document: Json) -> None:
    for name in FORBIDDEN:
        assert f"`{name}`" in document["info"]["description"]


def test_every_route_is_documented(served: Gateway, document: Json) -> None:
    paths = {path.path for path in PATHS}
    for route in served.app._app.routes:
        assert isinstance(route, Route)
        paths.add(route.path.replace(":path}", "}"))
    assert document["paths"].keys() == paths


async def test_every_documented_operation_is_served(served: Gateway, document: Json) -> None:
    for method, path, operation in operations(document):
        examples = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples")
        bodies = [example["value"] for example in examples.values()] if examples else [None]
        assert all(bodies) or not examples
        for body in bodies:
            if body is not None and body.get("stream"):
                continue  # the fake engine answers at once
            sent = b"" if body is None else json.dumps(body).encode()
            answer = await served.post(sent, path=path.replace("{model}", served.replica.tier.name), method=method)
            assert answer.status == 200, (method, path, answer.body)
            told = operation["responses"]["200"]["headers"].keys()
            assert answer.headers.keys() - {"content-type", "content-length"} <= told


async def test_other_methods_are_refused_as_told(served: Gateway, document: Json) -> None:
    for method, path, _ in operations(document):
        answer = await served.post(b"", path=path, method="DELETE")
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == method


def test_every_refusal_has_its_status_documented(document: Json) -> None:
    kinds = list(kinds_of(Refusal))
    assert len(kinds) > 20
    for _, path, operation in operations(document):
        if "requestBody" not in operation:
            continue
        for kind in kinds:
            if kind.code == "method_not_allowed":
                continue
            described = operation["responses"][str(kind.status)]["$ref"].removeprefix("#/components/responses/")
            told = document["components"]["responses"][described]["description"]
            assert kind.code is None or f"`{kind.code}`" in told, (path, kind)


def kinds_of(kind: type[Refusal]) -> Iterator[type[Refusal]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("server."):
            yield each
        yield from kinds_of(each)


async def test_a_certificate_is_documented_as_it_is_written(served: Gateway, document: Json) -> None:
    path = "/v1/tiers/{model}/certificate"
    told = document["paths"][path]["get"]["responses"]
    schema = told["200"]["content"]["application/json"]["schema"]
    assert "`no_certificate`" in document["components"]["responses"]["404"]["description"]
    answer = await served.post(b"", path=path.format(model=served.replica.tier.name), method="GET")
    validator = jsonschema.Draft202012Validator(schema | {"components": document["components"]})
    written = json.loads(answer.body)
    validator.validate(written)
    assert list(validator.iter_errors(written | {"more": 1}))
    written["predicate"]["findings"]["phases"]["decode"]["overall"]["kl"] = None
    assert list(validator.iter_errors(written))
    # What /v1/tiers tells of the same has its words added, which no certificate holds.
    formats = [document["components"]["schemas"][name] for name in ("NumberFormat", "Certificate.NumberFormat")]
    assert ["text" in each["properties"] for each in formats] == [True, False]


def test_nobody_is_promised_fastapis_own_error(document: Json) -> None:
    assert "ValidationError" not in json.dumps(document)


def test_each_operation_has_a_name_of_its_own(document: Json) -> None:
    told = [operation for _, _, operation in operations(document)]
    names = [operation["operationId"] for operation in told]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] and operation["tags"] for operation in told)
