"""LitServe: a worker process for each core, an API server for each of them.

Settings: ``workers_per_device`` (https://lightning.ai/docs/litserve/features/autoscaling), ``fast_queue``,
its ZeroMQ transport for high load, and ``num_api_servers``
(https://lightning.ai/docs/litserve/api-reference/litserver). A body annotated as bytes arrives as it is.
"""

from typing import Annotated

import litserve
from bare import PORT, WORKERS, Bare
from fastapi import Body, Response


class Api(litserve.LitAPI):
    def setup(self, device):
        self.model = Bare()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]):
        return request

    def predict(self, body):
        return self.model.run(body)

    def encode_response(self, output):
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(), accelerator="cpu", workers_per_device=WORKERS, fast_queue=True, timeout=False
    )
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=WORKERS,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
