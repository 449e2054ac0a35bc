"""MLServer: a custom runtime with a handler of its own for raw bytes.

Settings: raw bytes come through a custom handler, as the REST protocol is JSON alone. Its parallel workers
take what can be pickled, which a raw request isn't, so inference stays in the server's process
(``parallel_workers`` 0, https://docs.seldon.ai/mlserver/user-guide/parallel-inference), in threads: ONNX
Runtime releases the GIL.
"""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from bare import PORT, Bare
from mlserver import MLModel
from mlserver.handlers import custom_handler
from starlette.requests import Request
from starlette.responses import Response


class Inference(MLModel):
    async def load(self):
        self.model = Bare()
        return True

    @custom_handler(rest_path="/infer")
    async def infer(self, request: Request) -> Response:
        body = await request.body()
        found = await asyncio.to_thread(self.model.run, body)
        return Response(found, media_type="application/octet-stream")


if __name__ == "__main__":
    here = Path(__file__).parent
    folder = Path(tempfile.mkdtemp(prefix="mlserver-"))
    settings = {"host": "127.0.0.1", "http_port": PORT, "grpc_port": PORT + 1, "metrics_port": PORT + 2}
    settings |= {"parallel_workers": 0, "debug": False, "use_structured_logging": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "model", "implementation": "mlserver_server.Inference"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    command = [str(Path(sys.executable).with_name("mlserver")), "start", str(folder)]
    os.execve(command[0], command, {**os.environ, "PYTHONPATH": str(here)})
