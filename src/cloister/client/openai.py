"""`/v1/embeddings` in OpenAI's form, over a `Client`: for SDKs that take an httpx client.

Text never leaves the user's side as text: it is tokenised here, and the enclave runs a model of tensors that
gives one vector for each text. Source: https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx
import numpy as np

from cloister.client.client import AsyncClient, Client
from cloister.client.transport import raise_lost, timeout_of
from cloister.core.oip import Array
from cloister.core.protocol import problem
from cloister.errors import CloisterError, InvalidRequest, NotFound, UsageError

MAX_TEXTS: Final = 2048  # in one request, as at OpenAI
MAX_BODY: Final = 64 << 20  # bytes of JSON
BATCH: Final = 32  # texts in one inference
_EMBEDDINGS: Final = "/v1/embeddings"
_MODELS: Final = "/v1/models"


class Encoding(Protocol):
    """What a tokenizer makes of one text."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""


class Tokenizer(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    def encode_batch(self, texts: list[str], /) -> Sequence[Encoding]:
        """Tokenise texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbedder:
    """A served model that turns token ids into one vector for each text.

    Attributes:
        model: Model id or alias. It takes ``input_ids`` and ``attention_mask``, int64 of shape (n, tokens).
        tokenizer: The one that the model was trained with, without padding or truncation of its own.
        max_tokens: The longest text; a longer one is refused, never cut.
        output: The model's output of shape (n, width).
    """

    model: str
    tokenizer: Tokenizer
    max_tokens: int = 256
    output: str = "sentence_embedding"

    @classmethod
    def from_file(cls, model: str, path: str | os.PathLike[str], *, max_tokens: int = 256) -> TextEmbedder:
        """An embedder with the tokenizer of a ``tokenizer.json``; needs the extra ``embeddings``."""
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ModuleNotFoundError as error:
            raise UsageError(
                "tokenizers isn't installed",
                code="usage.extra",
                claim="extra",
                expected="tokenizers",
                actual="none",
                hint="In a checkout: pip install '.[embeddings]'",
            ) from error
        try:
            tokenizer: Any = FastTokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises nothing more precise
            raise UsageError(
                "the tokenizer can't be read",
                code="file.read",
                claim="tokenizer",
                expected="a tokenizer.json",
                actual=os.fspath(path),
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(model=model, tokenizer=tokenizer, max_tokens=max_tokens)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; raises InvalidRequest where one has too many."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        longest = max(map(len, tokens))
        if longest > self.max_tokens:
            raise InvalidRequest(
                "a text is too long for the model",
                code="request.tokens",
                claim="tokens of a text",
                expected=f"at most {self.max_tokens}",
                actual=longest,
                hint="Split it",
            )
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One request for embeddings, tokenised."""

    name: str
    embedder: TextEmbedder
    tokens: list[list[int]] = field(repr=False)
    dimensions: int | None
    as_base64: bool

    @classmethod
    def read(cls, content: bytes, embedders: Mapping[str, TextEmbedder]) -> _Job:
        """Read a request; raises InvalidRequest or NotFound."""
        try:
            body = json.loads(content) if len(content) <= MAX_BODY else None
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise _bad("body", f"a JSON object of at most {MAX_BODY} B", "something else")
        name, form, width = body.get("model"), body.get("encoding_format", "float"), body.get("dimensions")
        embedder = embedders.get(name) if isinstance(name, str) else None
        if embedder is None:
            raise _unknown(name, embedders)
        if form not in ("float", "base64"):
            raise _bad("encoding_format", "float or base64", str(form)[:40])
        if width is not None and type(width) is not int:
            raise _bad("dimensions", "a whole number", type(width).__name__)
        texts = _texts(body.get("input"))
        return cls(
            name=str(name),
            embedder=embedder,
            tokens=embedder.tokenize(texts),
            dimensions=width,
            as_base64=form == "base64",
        )

    def batches(self) -> Iterator[dict[str, Array]]:
        """The model's inputs, `BATCH` texts at a time, filled up to the longest of each."""
        for start in range(0, len(self.tokens), BATCH):
            part = self.tokens[start : start + BATCH]
            ids = np.zeros((len(part), max(map(len, part))), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            yield {"input_ids": ids, "attention_mask": mask}

    def answer(self, vectors: list[Array]) -> dict[str, Any]:
        """The answer; raises InvalidRequest where the vectors have another width than was asked for."""
        rows = np.concatenate(vectors).astype("<f4")
        if self.dimensions not in (None, rows.shape[1]):
            raise _bad("dimensions", f"{rows.shape[1]}, or left out", self.dimensions)
        count = sum(map(len, self.tokens))
        return {
            "object": "list",
            "model": self.name,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": base64.b64encode(row).decode() if self.as_base64 else row.tolist(),
                }
                for index, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }


class OpenAITransport(httpx.BaseTransport):
    """An httpx transport that answers OpenAI's embeddings and models, over a `Client` that it closes.

    Args:
        client: Attests, seals, signs.
        embedders: Name, as the SDK's user writes it -> the model behind it.
    """

    def __init__(self, client: Client, embedders: Mapping[str, TextEmbedder]) -> None:
        self._client = client
        self._embedders = dict(embedders)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; errors come in OpenAI's form."""
        try:
            if _wants_models(request):
                return _answer(request, _models(request, self._embedders))
            job = _Job.read(request.read(), self._embedders)
            output = job.embedder.output
            vectors = [
                self._client.infer(
                    job.embedder.model, inputs, outputs=(output,), timeout=timeout_of(request)
                )[output]
                for inputs in job.batches()
            ]
            return _answer(request, job.answer(vectors))
        except CloisterError as error:
            return _refusal(request, error)

    def close(self) -> None:
        """Close the client."""
        self._client.close()


class AsyncOpenAITransport(httpx.AsyncBaseTransport):
    """The same over an `AsyncClient`."""

    def __init__(self, client: AsyncClient, embedders: Mapping[str, TextEmbedder]) -> None:
        self._client = client
        self._embedders = dict(embedders)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; errors come in OpenAI's form."""
        try:
            if _wants_models(request):
                return _answer(request, _models(request, self._embedders))
            job = _Job.read(await request.aread(), self._embedders)
            output = job.embedder.output
            vectors = [
                (
                    await self._client.infer(
                        job.embedder.model, inputs, outputs=(output,), timeout=timeout_of(request)
                    )
                )[output]
                for inputs in job.batches()
            ]
            return _answer(request, job.answer(vectors))
        except CloisterError as error:
            return _refusal(request, error)

    async def aclose(self) -> None:
        """Close the client."""
        await self._client.aclose()


def _wants_models(request: httpx.Request) -> bool:
    """Whether it asks for models, else for embeddings; raises NotFound for anything else."""
    path = request.url.path
    if request.method == "GET" and (path == _MODELS or path.startswith(_MODELS + "/")):
        return True
    if (request.method, path) == ("POST", _EMBEDDINGS):
        return False
    raise NotFound(
        "no such route",
        code="not-found.route",
        claim="route",
        expected=f"POST {_EMBEDDINGS} or GET {_MODELS}",
        actual=f"{request.method} {path}"[:80],
    )


def _models(request: httpx.Request, embedders: Mapping[str, TextEmbedder]) -> dict[str, Any]:
    listed = {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "cloister"} for name in embedders
    }
    if request.url.path == _MODELS:
        return {"object": "list", "data": list(listed.values())}
    name = request.url.path.removeprefix(_MODELS + "/")
    if name not in listed:
        raise _unknown(name, embedders)
    return listed[name]


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise _bad("input", f"a text, or 1 to {MAX_TEXTS} of them", "something else")
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            "token ids are another model's",
            code="request.inputs",
            claim="input",
            expected="text",
            actual="something else",
            hint="Have the SDK send text; in LangChain: check_embedding_ctx_length=False",
        )
    if not all(texts):
        raise _bad("input", "texts that aren't empty", "an empty one")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # JSON can name half a surrogate pair
        raise _bad("input", "Unicode text", "half a character") from error
    return texts


def _answer(request: httpx.Request, value: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, json=value, request=request)


def _refusal(request: httpx.Request, error: CloisterError) -> httpx.Response:
    raise_lost(error, request)
    status = problem.status_of(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = {"message": str(error), "type": kind, "param": None, "code": error.code}
    return httpx.Response(status, json={"error": told}, request=request)


def _unknown(name: object, embedders: Mapping[str, TextEmbedder]) -> NotFound:
    return NotFound(
        "no such model here",
        code="not-found.model",
        claim="model",
        expected=", ".join(embedders),
        actual=str(name)[:80],
    )


def _bad(claim: str, expected: object, actual: object) -> InvalidRequest:
    return InvalidRequest(code="request.inputs", claim=claim, expected=expected, actual=actual)
