"""Ray Serve: a replica for each core, behind HAProxy.

Settings: RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED, "high throughput mode"
(https://docs.ray.io/en/master/cluster/kubernetes/user-guides/kuberay-serve-high-throughput.html),
``num_replicas`` and ``max_ongoing_requests``
(https://docs.ray.io/en/latest/serve/configure-serve-deployment.html), no access log
(https://docs.ray.io/en/latest/serve/advanced-guides/performance.html).
"""

import asyncio
import os
import signal
import tempfile

from bare import PORT, WORKERS, Bare

FOLDER = tempfile.gettempdir()  # private to this peer; short, as HAProxy's and Ray's sockets lie below it
os.environ |= {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{FOLDER}/haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{FOLDER}/admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{FOLDER}/metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": FOLDER,
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{FOLDER}/server-state",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(PORT + 1),
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(PORT + 2),
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": os.path.dirname(os.path.abspath(__file__)),
}

import ray  # noqa: E402  (the settings are read at import)
from ray import serve  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402


@serve.deployment(
    num_replicas=WORKERS,
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": 0},
    logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
)
class Inference:
    def __init__(self):
        self.model = Bare()

    async def __call__(self, request: Request):
        body = await request.body()
        found = await asyncio.to_thread(self.model.run, body)
        return Response(found, media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(include_dashboard=False, _temp_dir=FOLDER, object_store_memory=256 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Inference.bind(), route_prefix="/infer")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
