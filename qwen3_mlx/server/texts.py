"""Base of the endpoints that compute vectors or scores of texts."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.api.prepared_texts import PreparedTexts
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.endpoint import Endpoint
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.request_body import Body
from qwen3_mlx.server.wire import warnings_header
from qwen3_mlx.text.events import Usage
from qwen3_mlx.text.fair_queue import Caller

_MAX_TEXTS = 2048  # OpenAI's limit
_MAX_CHARACTERS = 8 << 20  # of a request: all are encoded before the first is computed
_NUMBER_BYTES = 12  # JSON of a float32


class TextsEndpoint(Endpoint[Body]):
    """Base of the endpoints that compute something of each text.

    The `__init__` of a subclass sets `prepare`, which checks and encodes the texts, and `contents`,
    what `--log-content` logs.
    """

    param = "input"
    prepare: Callable[[], PreparedTexts]
    contents: Sequence[Any]

    @staticmethod
    def rename_fields(message: str) -> str:
        """Return an error of the library with the names of fields, and JSON's `true`."""
        message = message.replace("truncate=True", "truncate=true")
        return f"input{message[5:]}" if message.startswith("texts[") else message

    @abstractmethod
    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response as JSON, for values [N, F] of N texts that have `num_tokens`."""

    async def respond(self, request: Request, slot: Slot) -> Response:
        """Return the response; the computation ends if the client disconnects."""
        service, num_done = self.service, 0
        if service.settings.log_content:
            slot.record["prompts"] = self.contents

        def follow(done: int, _: int) -> None:
            nonlocal num_done
            num_done = done
            if slot.cancelled.is_set():  # an error ends the computation
                raise Qwen3Error("it was cancelled")

        def work(_: Caller) -> tuple[PreparedTexts, np.ndarray]:
            prepared = self.prepare()
            try:
                return prepared, np.array(service.llm.compute_texts(prepared, follow))
            except Qwen3Error as error:  # not the request's fault: more memory may be free later
                raise ApiError.of(error) from error

        started = time.perf_counter()
        try:
            prepared, values = await service.computing.run(request, slot.cancelled, work)
        except ApiError as error:
            if num_done:
                slot.spend(Usage(num_done, 0, 0, 0))
            self.rename(error)
            raise
        if prepared.num_cut:
            of = f"{prepared.num_cut} of {len(values)} texts"
            self.warnings.append(f"{of} were cut at their end: the model reads no more")
        count = prepared.num_tokens
        usage = Usage(count, count - prepared.num_read, 0, 0)
        slot.spend(usage)
        slot.record |= {"texts": len(values), **asdict(usage)}
        slot.release(time.perf_counter() - started)
        content = await service.run_sized(
            values.size * _NUMBER_BYTES, partial(self.complete, values, count)
        )
        headers = warnings_header(self.warnings)
        return Response(content, media_type="application/json", headers=headers)


def check_amount(name: str, texts: Sequence[str | Sequence[int]], before: int = 0) -> None:
    """Check the number and the size of texts; `before` characters stand before each of them.

    Raises:
        ValueError: there are none, too many, or they have too many characters.
    """
    if not texts:
        raise ValueError(f"{name} is empty; give some text")
    if len(texts) > _MAX_TEXTS:
        raise ValueError(
            f"{name} has {len(texts):,} texts, and at most {_MAX_TEXTS:,} are taken at once; send "
            "them in parts"
        )
    size = sum(map(len, texts)) + before * len(texts)
    if size > _MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {size:,} characters with what stands before each text, and at most "
            f"{_MAX_CHARACTERS:,} are taken at once; send the texts in parts"
        )


def vector_json(vector: np.ndarray) -> bytes:
    """Return a float32 vector as JSON, each number with the digits that a float32 needs."""
    return f"[{','.join(vector.astype(str))}]".encode()
