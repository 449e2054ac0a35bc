"""The worker enclave: models, sessions, requests."""

import os

# ONNX Runtime reports of sessions, hashes of their graphs and weights included, to a file and to its makers,
# unless this is there when it is first imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
