"""What every peer serves: a float32 tensor in, the first output out, raw bytes; ONNX Runtime as in Cloister.

Each file beside this one serves it with one framework, in an environment of its own:
``python FILE MODEL PORT WORKERS``. Nothing of Cloister is imported there.
"""

import os
import sys

import numpy as np
import onnxruntime as ort

# Processes that a framework starts find the arguments in the environment.
if len(sys.argv) == 4 and sys.argv[3].isdigit():
    os.environ["PEER_MODEL"], os.environ["PEER_PORT"], os.environ["PEER_WORKERS"] = sys.argv[1:]
MODEL = os.environ["PEER_MODEL"]
PORT = int(os.environ["PEER_PORT"])
WORKERS = int(os.environ["PEER_WORKERS"])


class Bare:
    """One session; `run` releases the GIL."""

    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
        (self.input,) = self.session.get_inputs()
        self.output = self.session.get_outputs()[0].name
        self.shape = [side if isinstance(side, int) else 1 for side in self.input.shape]

    def run(self, body):
        tensor = np.frombuffer(body, dtype=np.float32).reshape(self.shape)
        (found,) = self.session.run([self.output], {self.input.name: tensor})
        return found.tobytes()
