"""What a model takes and gives: the names, datatypes and shapes of its inputs and outputs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from cloister.core import model
from cloister.core.oip import DTYPES, Array
from cloister.errors import InvalidRequest

# ONNX Runtime's names of tensor types, as the Open Inference Protocol has them.
_DATATYPES: Final = {f"tensor({kind.lower()})": name for kind, name in model.DATATYPES.items()}


class TensorSpec(model.TensorSpec):
    """An input or output of a session."""

    __slots__ = ()

    @classmethod
    def of(cls, argument: Any) -> TensorSpec:
        """The spec of an ONNX Runtime argument."""
        shape = tuple(side if isinstance(side, int) else -1 for side in argument.shape)
        return cls(name=argument.name, datatype=_DATATYPES.get(argument.type, argument.type), shape=shape)

    def require(self, array: Array) -> Array:
        """Refuse an array of another datatype or shape; gives the array as the session takes it.

        A side of zero is refused where the model doesn't have it. For inputs without elements some of ONNX
        Runtime's operators check no shapes (1.31: Concat, ConvInteger, Scan, LSTM): they answer with memory
        that they didn't write, and others end the process.

        Raises:
            InvalidRequest: which names the input, the expected and the actual value.
        """
        wanted = DTYPES.get(self.datatype)
        if wanted is None or array.dtype != wanted:
            raise InvalidRequest(
                code="request.datatype",
                claim=f"datatype of {self.name}",
                expected=self.datatype,
                actual=array.dtype,
            )
        fits = len(array.shape) == len(self.shape) and all(
            want == have or (want == -1 and have > 0)
            for want, have in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                code="request.shape",
                claim=f"shape of {self.name}",
                expected=self.shape,
                actual=array.shape,
                hint="" if array.size else "A free side (-1) is 1 at least",
            )
        if self.datatype == "BYTES":
            try:
                return (
                    np.vectorize(lambda item: item.decode(), otypes=[object])(array) if array.size else array
                )
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    code="request.data", claim=f"data of {self.name}", expected="UTF-8", actual="other bytes"
                ) from error
        return array
