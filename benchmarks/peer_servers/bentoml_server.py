"""BentoML: a worker process for each core.

Settings: ``workers``
(https://docs.bentoml.com/en/latest/build-with-bentoml/parallelize-requests.html) and ``traffic``
(https://docs.bentoml.com/en/latest/reference/bentoml/configurations.html), no access log. Raw bytes come
through an ASGI application mounted into the service: its own inputs are JSON, files or pickle.
"""

import os
import sys
from pathlib import Path

import bentoml
from bare import PORT, WORKERS, Bare
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

model = Bare()


async def infer(request):
    body = await request.body()
    return Response(await run_in_threadpool(model.run, body), media_type="application/octet-stream")


@bentoml.asgi_app(Starlette(routes=[Route("/infer", infer, methods=["POST"])]), path="/raw")
@bentoml.service(
    workers=WORKERS,
    traffic={"timeout": 60, "concurrency": 64},
    logging={"access": {"enabled": False}},
)
class Inference:
    @bentoml.api
    def ready(self) -> bool:
        return True


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Inference"]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    os.execve(command[0], command, {**os.environ, "BENTOML_DO_NOT_TRACK": "True"})
