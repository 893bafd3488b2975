"""GET /openapi.json: FastAPI's account of its own routes, and beside it that of the paths it does not know."""

import inspect
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import server.connections  # noqa: F401  # whose refusals are told too
from server import errors
from server.call import FORBIDDEN
from server.health import OPEN_PATHS
from server.openapi.operations import OPERATIONS, Operation
from server.tiers_api import CERTIFICATE_SCHEMA
from tiers.conformance.certificate import Certificate

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"


_INTRODUCTION = """One model at several precisions, behind one OpenAI-compatible API.

Every answer has an `x-request-id`: the caller's own where it is harmless, or a new one. Every error is OpenAI's
envelope with all four fields, also where a path (404, `unknown_route`) or a method (405, `method_not_allowed`)
does not exist; an error in a stream that has begun is its last event.

Bodies may hold further fields of vLLM's, which are passed on, and none of these, which could harm other callers:
{forbidden}."""
_STREAM = """One server-sent event. {last} Lines that begin with a colon are comments, sent while nothing else
comes, so that the connection is kept."""
_HEADERS = {
    "x-request-id": "What this request goes by in the logs of the gateway and of its engine.",
    "openai-processing-ms": "Until the answer began.",
    "x-assay-tier": "The tier that answered.",
    "x-assay-precision": "Its precision.",
    "x-assay-checkpoint": "The beginning of its checkpoint's digest, which `GET /v1/tiers` has whole.",
    "x-assay-certificate": "What its certificate says of the tier as it runs now: `pass`, `fail`, or `none`.",
    "x-ratelimit-limit-requests": "Of the caller's key, a minute, where it has such a limit.",
    "x-ratelimit-remaining-requests": "What is left of it.",
    "x-ratelimit-reset-requests": "When all of it is there again.",
    "x-ratelimit-limit-tokens": "Of the caller's key, a minute, where it has such a limit.",
    "x-ratelimit-remaining-tokens": "What is left of it.",
    "x-ratelimit-reset-tokens": "When all of it is there again.",
    "retry-after": "Seconds after which to try again, where that can help.",
    "www-authenticate": "How to send a key.",
}
_ONLY_WITH = {"retry-after": (429, 503), "www-authenticate": (401,)}
"""The statuses of headers that others do not have."""
_ANYWHERE = (400, 408, 431, 500, 503)
"""What may become of any request at all."""
_STATUSES = {
    400: (
        "The request is not right; in the engine's own words where that refused it, with the code "
        "`context_length_exceeded` where prompt and answer are longer than the model's context."
    ),
    401: "A key is needed, or this one is not known.",
    403: "The key is not for this tier.",
    404: "There is no such model, or no certificate of it.",
    408: "The body did not come in time.",
    413: "The body is too large; it was not read to its end.",
    422: "The request is right, and the engine cannot do it.",
    429: "A limit of the key is reached, or too many wait.",
    431: "The headers are too large.",
    500: "The engine failed on this request, or the gateway did.",
    503: "The tier cannot answer now.",
    504: "A limit of time was reached.",
}


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's envelope."""

    error: Error


class Document:
    """What ``app`` serves, and the paths in front of it; ``model`` is the one that examples ask."""

    def __init__(self, app: FastAPI, model: str) -> None:
        self._app = app
        self._model = model

    @cached_property
    def json(self) -> bytes:
        """Made when it is first asked for."""
        return json.dumps(self._make()).encode()

    def _make(self) -> Json:
        made = get_openapi(
            title=self._app.title,
            version=self._app.version,
            description=_INTRODUCTION.format(forbidden=", ".join(f"`{name}`" for name in sorted(FORBIDDEN))),
            routes=self._app.routes,
        )
        schemas = {
            name: schema
            for name, schema in made["components"]["schemas"].items()
            if "ValidationError" not in name  # FastAPI's own error, which nobody gets here
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                _tell_errors(operation, path)
        made["paths"] |= {each.path: {"post": self._tell(each)} for each in OPERATIONS}
        made["components"] = {
            "schemas": schemas | _schemas() | _certificate(),
            "responses": {str(status): _error(status) for status in _STATUSES},
            "headers": {
                name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Made by `assay keys add NAME`. Where there is none, none is needed.",
                }
            },
        }
        made["security"] = [{"key": []}, {}]
        return made

    def _tell(self, operation: Operation) -> Json:
        request = [_ref(model) for model in operation.requests]
        content: Json = {"application/json": {"schema": _ref(operation.answer)}}
        if operation.event:
            content["text/event-stream"] = {"schema": _event(operation.event, operation.last_event)}
        return {
            "operationId": operation.id,
            "summary": operation.summary,
            "description": "Not taken: " + ", ".join(f"`{name}`" for name in operation.refused) + "."
            if operation.refused
            else operation.summary + ".",
            "tags": [operation.tag],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": request[0] if len(request) == 1 else {"anyOf": request},
                        "examples": {
                            re.sub(r"\W+", "_", title.lower()): {
                                "summary": title,
                                "value": {"model": self._model} | body,
                            }
                            for title, body in operation.examples.items()
                        },
                    }
                },
            },
            "responses": {"200": {"description": "The answer.", "headers": _headers(200), "content": content}}
            | {str(status): {"$ref": f"#/components/responses/{status}"} for status in _STATUSES},
        }


def openapi_router(document: Document) -> APIRouter:
    """GET /openapi.json."""
    router = APIRouter(tags=["about"])

    @router.get("/openapi.json", response_model=dict[str, Any])
    def get_openapi_document() -> Response:  # in a thread: making it takes a while
        """This document."""
        return Response(document.json, media_type="application/json")

    return router


def _schemas() -> Json:
    asked = [(model, "validation") for each in OPERATIONS for model in each.requests]
    told = [
        (model, "serialization")
        for each in OPERATIONS
        for model in (each.answer, each.event, ErrorAnswer)
        if model is not None
    ]
    schemas: Json = models_json_schema([*asked, *told], ref_template=_REF)[1]["$defs"]  # type: ignore[list-item]
    return schemas


def _certificate() -> Json:
    """A certificate as it is written, where `GET /v1/tiers` tells some of the same with words added."""
    of_its_own = _REF.format(model=f"{CERTIFICATE_SCHEMA}.{{model}}")
    schemas: Json = models_json_schema([(Certificate, "validation")], ref_template=of_its_own)[1]["$defs"]
    whole = schemas.pop(Certificate.__name__)
    return {CERTIFICATE_SCHEMA: whole} | {f"{CERTIFICATE_SCHEMA}.{name}": each for name, each in schemas.items()}


def _event(model: type[BaseModel], last: str | None) -> Json:
    """Each event of a stream, as OpenAPI tells them from 3.2 on; before, that is only a custom."""
    payload = {"anyOf": [_ref(model), _ref(ErrorAnswer)]}
    data: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": payload}
    told = f"`data: {last}` is the last." if last else "The last has the whole answer, or an error."
    return {
        "type": "object",
        "description": " ".join(_STREAM.format(last=told).split()),
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [{"const": last}, data]} if last else data},
        "required": ["data"],
    }


def _tell_errors(operation: Json, path: str) -> None:
    """What FastAPI does not know of its own routes: how they refuse, and who may ask."""
    answers = operation["responses"]
    answers.pop("422", None)
    answers["200"]["headers"] = {name: _header(name) for name in ("x-request-id", "openai-processing-ms")}
    statuses = list(_ANYWHERE)
    if path in OPEN_PATHS:
        operation["security"] = []
    else:
        statuses.append(401)
    if "{" in path:
        statuses.append(404)
    for status in map(str, statuses):
        if status in answers:  # it has a meaning of its own here
            content = answers[status]["content"]["application/json"]
            content["schema"] = {"anyOf": [content["schema"], _ref(ErrorAnswer)]}
        else:
            answers[status] = {"$ref": f"#/components/responses/{status}"}


def _error(status: int) -> Json:
    """One status, with every refusal that has it."""
    codes = "\n".join(
        f"- `{kind.code}`: {inspect.cleandoc(kind.__doc__ or '')}" for kind in _refusals() if kind.status == status
    )
    return {
        "description": f"{_STATUSES[status]}\n\n{codes}".strip(),
        "headers": _headers(status),
        "content": {"application/json": {"schema": _ref(ErrorAnswer)}},
    }


def _refusals(kind: type[errors.Refusal] = errors.Refusal) -> Iterator[type[errors.Refusal]]:
    for each in kind.__subclasses__():
        if each.code is not None and each.__module__.startswith("server."):
            yield each
        yield from _refusals(each)


def _headers(status: int) -> Json:
    """Those that an answer with this status may have."""
    return {name: _header(name) for name in _HEADERS if status in _ONLY_WITH.get(name, (status,))}


def _header(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}
