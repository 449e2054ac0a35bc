"""mosec: its web layer in Rust, a worker process for each core.

Settings: ``num`` processes for a stage that the GIL or the model would hold up, and bytes instead of JSON by
overriding ``serialize`` and ``deserialize`` (https://mosecorg.github.io/mosec/reference/interface.html). No
dynamic batching: on this processor a batch takes as long as its members one by one.
"""

import sys

from bare import PORT, WORKERS, Bare
from mosec import Server, Worker


class Inference(Worker):
    resp_mime_type = "application/octet-stream"

    def __init__(self):
        super().__init__()
        self.model = Bare()

    def deserialize(self, data):
        return data

    def serialize(self, data):
        return data

    def forward(self, data):
        return self.model.run(data)


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(PORT), "--timeout", "60000"]
    sys.argv += ["--max-request-size", str(64 << 20), "--log-level", "warning"]
    server = Server()
    server.append_worker(Inference, num=WORKERS)
    server.run()
