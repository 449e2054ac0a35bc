"""OpenAI's embeddings over a client: every refusal first, then what is sent and what comes back."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.client.openai import (
    BATCH,
    MAX_TEXTS,
    AsyncOpenAITransport,
    OpenAITransport,
    TextEmbedder,
)
from cloister.errors import AccessRefused, CloisterError, Overloaded, TransportError, UsageError


class Letters:
    """A tokenizer: one token for each character."""

    def encode_batch(self, texts: list[str]) -> list[Any]:
        return [SimpleNamespace(ids=[1 + ord(letter) % 100 for letter in text]) for text in texts]


class Enclave:
    """A client whose model gives (sum of the token ids, number of tokens) for each text."""

    def __init__(self, failure: CloisterError | None = None) -> None:
        self.failure = failure
        self.asked: list[tuple[int, ...]] = []
        self.closed = 0

    def infer(
        self, model: str, inputs: dict[str, Any], *, outputs: tuple[str, ...], timeout: float | None
    ) -> dict[str, Any]:
        assert timeout == 5.0, "httpx's own"
        if self.failure is not None:
            raise self.failure
        assert (model, outputs) == ("o/m", ("vectors",))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.dtype == mask.dtype == np.int64
        assert (ids[mask == 0] == 0).all()
        self.asked.append(ids.shape)
        return {"vectors": np.stack([ids.sum(axis=1), mask.sum(axis=1)], axis=1).astype(np.float32)}

    def close(self) -> None:
        self.closed += 1


class AsyncEnclave(Enclave):
    async def infer(self, *given: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        return Enclave.infer(self, *given, **named)

    async def aclose(self) -> None:
        self.closed += 1


EMBEDDER = TextEmbedder(model="o/m", tokenizer=Letters(), max_tokens=20, output="vectors")


def sdk(enclave: Enclave) -> httpx.Client:
    transport = OpenAITransport(enclave, {"small": EMBEDDER})  # type: ignore[arg-type]
    return httpx.Client(transport=transport, base_url="http://m/v1")


def post(body: Any, enclave: Enclave | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with sdk(enclave or Enclave()) as made:
        return made.post("/embeddings", content=content)


def request(**changes: Any) -> dict[str, Any]:
    return {"model": "small", "input": ["ab"], **changes}


# -- refusals ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "request.inputs"),
        (b"{", 400, "request.inputs"),
        (b"[]", 400, "request.inputs"),
        (b"\xff", 400, "request.inputs"),
        (b"[" * 100_000, 400, "request.inputs"),
        (request(input=None), 400, "request.inputs"),
        (request(input=[]), 400, "request.inputs"),
        (request(input=""), 400, "request.inputs"),
        (request(input=["a", ""]), 400, "request.inputs"),
        (request(input=["a"] * (MAX_TEXTS + 1)), 400, "request.inputs"),
        (request(input={"a": 1}), 400, "request.inputs"),
        (request(input=[1, 2, 3]), 400, "request.inputs"),
        (request(input=[[1, 2], [3]]), 400, "request.inputs"),
        (request(input="\ud800"), 400, "request.inputs"),
        (request(input=["a", "x" * 21]), 400, "request.tokens"),
        (request(encoding_format="hex"), 400, "request.inputs"),
        (request(encoding_format=1), 400, "request.inputs"),
        (request(dimensions="2"), 400, "request.inputs"),
        (request(dimensions=3), 400, "request.inputs"),
        (request(model="large"), 404, "not-found.model"),
        (request(model=["small"]), 404, "not-found.model"),
        ({"input": "a"}, 404, "not-found.model"),
    ],
)
def test_requests_that_are_refused(body, status, code):
    answer = post(body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert error["message"]


def test_a_refusal_never_quotes_the_text():
    answer = post(request(input=["my secret diagnosis is long"]))
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["/chat/completions", "/embeddings/x", "/models/x/y", "/"])
def test_other_routes(path):
    with sdk(Enclave()) as made:
        assert made.post(path, json=request()).status_code == 404
        assert made.get("/embeddings").status_code == 404
        assert made.delete("/models/small").status_code == 404


def test_what_the_enclave_refuses():
    refused = post(request(), Enclave(AccessRefused("no", code="access.grant")))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "access.grant")
    busy = post(request(), Enclave(Overloaded("full")))
    assert busy.status_code == 429
    with pytest.raises(httpx.TransportError):
        post(request(), Enclave(TransportError("gone")))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_a_tokenizer_that_is_none(tmp_path, content):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        TextEmbedder.from_file("o/m", tmp_path / "t.json")
    assert caught.value.code == "file.read"


def test_without_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError) as caught:
        TextEmbedder.from_file("o/m", "t.json")
    assert (caught.value.code, caught.value.expected) == ("usage.extra", "tokenizers")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda each: st.lists(each), max_leaves=5
    )
)
def test_any_input_gets_an_answer(given_):
    assert post(request(input=given_)).status_code in (200, 400)


# -- what holds ----------------------------------------------------------------


def test_vectors_usage_and_order():
    answer = post(request(input=["ab", "c"])).json()
    assert answer["object"] == "list"
    assert answer["model"] == "small"
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert [item["embedding"] for item in answer["data"]] == [[197.0, 2.0], [100.0, 1.0]]
    coded = post(request(input=["ab", "c"], encoding_format="base64", dimensions=2)).json()
    raw = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() for item in coded["data"]]
    assert raw == [[197.0, 2.0], [100.0, 1.0]]
    assert post(request(input="ab")).json()["data"] == answer["data"][:1]


def test_many_texts_go_in_batches():
    enclave = Enclave()
    texts = ["x" * (1 + index % 7) for index in range(2 * BATCH + 5)]
    answer = post(request(input=texts), enclave).json()
    assert [item["embedding"][1] for item in answer["data"]] == [len(text) for text in texts]
    assert [shape[0] for shape in enclave.asked] == [BATCH, BATCH, 5]


def test_models_and_closing():
    enclave = Enclave()
    with sdk(enclave) as made:
        listed = made.get("/models").json()
        assert [each["id"] for each in listed["data"]] == ["small"]
        assert made.get("/models/small").json() == listed["data"][0]
        assert made.get("/models/large").json()["error"]["code"] == "not-found.model"
    assert enclave.closed == 1
    assert enclave.asked == []


@pytest.mark.asyncio
async def test_asynchronously():
    enclave = AsyncEnclave()
    transport = AsyncOpenAITransport(enclave, {"small": EMBEDDER})  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://m/v1") as made:
        answer = await made.post("/embeddings", json=request())
        assert answer.json()["data"][0]["embedding"] == [197.0, 2.0]
        assert (await made.get("/models")).status_code == 200
        assert (await made.post("/embeddings", json=request(input=[1]))).status_code == 400
    assert enclave.closed == 1
