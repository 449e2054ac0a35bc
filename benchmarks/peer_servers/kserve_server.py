"""KServe's model server: a uvicorn process for each core.

Settings: ``workers``, no latency log, no gRPC
(https://kserve.github.io/website/docs/reference/python-runtime-sdk/python-runtime-sdk-api). A body of another
type than JSON and octet-stream reaches a custom model of the v1 protocol as bytes, and bytes leave it as they
are. Its binary form of the v2 protocol makes lists of the tensor first.
"""

import asyncio

from bare import PORT, WORKERS, Bare
from kserve import Model, ModelServer


class Inference(Model):
    def __init__(self):
        super().__init__("model")
        self.ready = True
        self.model = None

    def load(self):
        self.model = Bare()
        return True

    async def predict(self, payload, headers=None, response_headers=None):
        if self.model is None:  # each worker process loads its own
            self.load()
        return await asyncio.to_thread(self.model.run, payload)


if __name__ == "__main__":
    ModelServer(http_port=PORT, workers=WORKERS, enable_grpc=False, enable_latency_logging=False).start(
        [Inference()]
    )
