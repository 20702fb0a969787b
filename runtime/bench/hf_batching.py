"""Hugging Face continuous batching: what ``model.generate_batch`` runs, kept ready between runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from transformers import GenerationConfig

from .peers import NotMeasured, Peer, Served, Setup
from .workloads import Request


class ContinuousBatching(Peer):
    """Requests go to the manager as they arrive; it stamps each token itself."""

    name = "hf-batching"
    warm_tokens = 4

    def __init__(self, setup: Setup) -> None:
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError as error:
            raise NotMeasured("this transformers has no continuous batching of that kind") from error
        model: Any = setup.source.model()
        self._stack = ExitStack()
        self._manager: Any = self._stack.enter_context(
            model.continuous_batching_context_manager(
                GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                continuous_batching_config=ContinuousBatchingConfig(
                    max_memory_percent=setup.memory,
                    max_requests_per_batch=setup.max_batch_size,
                    # Nobody else keeps prefixes.
                    allow_block_sharing=False,
                ),
                timeout=60,
            )
        )

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        return [one.tokens for one in self.serve([Request(prompt, new_tokens) for prompt in prompts])]

    def serve(self, requests: Sequence[Request]) -> list[Served]:
        begin, names = time.perf_counter(), []
        for request in requests:
            time.sleep(max(0.0, request.arrival - (time.perf_counter() - begin)))
            names.append(
                self._manager.add_request(
                    list(request.prompt), max_new_tokens=request.new_tokens, record_timestamps=True, eos_token_id=-1
                )
            )
        done: dict[str, Served] = {}
        while len(done) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("its thread has ended before all requests were served")
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                times = [stamp - begin for stamp in result.timestamps or ()]
                done[result.request_id] = Served(list(result.generated_tokens), times)
        return [done[name] for name in names]

    def close(self) -> None:
        self._stack.close()
        del self._manager
