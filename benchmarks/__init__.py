"""Benchmarks: what protection costs, measured beside what it is compared with."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the first import of onnxruntime
