"""vLLM, where it is installed."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..ranks import size_of
from .peers import NotMeasured, Peer, Served, Setup
from .workloads import Request


class Vllm(Peer):
    """vLLM's offline engine. A shape gets vLLM's own random weights, so its tokens are its own."""

    name = "vllm"
    divides = True

    def __init__(self, setup: Setup) -> None:
        try:
            import vllm
        except ImportError as error:
            raise NotMeasured("not installed; run: pip install vllm") from error
        if setup.tensor_parallel > 1 and size_of() is not None:
            raise NotMeasured("starts its ranks itself; run fuseline bench without mpirun or torchrun")
        source = setup.source
        # It takes its share of the whole memory.
        source.release()
        self.same_weights = source.path is not None
        self._folder = tempfile.TemporaryDirectory()
        if source.path is None:
            source.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source.config.model_type]]
            source.config.save_pretrained(self._folder.name)
        self._vllm: Any = vllm
        self._count = 0
        self._llm: Any = vllm.LLM(
            model=source.path or self._folder.name,
            dtype=str(source.dtype).removeprefix("torch."),
            load_format="auto" if source.path else "dummy",
            skip_tokenizer_init=True,
            gpu_memory_utilization=setup.memory,
            max_num_seqs=setup.max_batch_size,
            max_model_len=setup.max_seq_len,
            tensor_parallel_size=setup.tensor_parallel,
            enable_expert_parallel=bool(setup.expert_parallel),
            # Nobody else keeps prefixes.
            enable_prefix_caching=False,
        )

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        given = [self._prompt(prompt) for prompt in prompts]
        done = self._llm.generate(given, self._params(new_tokens), use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    def serve(self, requests: Sequence[Request]) -> list[Served]:
        engine, coming = self._llm.llm_engine, deque(requests)
        served: dict[str, Served] = {}
        begin = time.perf_counter()
        while coming or engine.has_unfinished_requests():
            now = time.perf_counter() - begin
            while coming and coming[0].arrival <= now:
                request = coming.popleft()
                name = f"request-{self._count}"
                self._count += 1
                served[name] = Served([], [])
                engine.add_request(name, self._prompt(request.prompt), self._params(request.new_tokens))
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, coming[0].arrival - now))
                continue
            for result in engine.step():
                one, tokens = served[result.request_id], list(result.outputs[0].token_ids)
                # Each result holds all tokens so far.
                one.times.extend([time.perf_counter() - begin] * (len(tokens) - len(one.tokens)))
                one.tokens[:] = tokens
        return list(served.values())

    def close(self) -> None:
        # Its engine is a process of its own, which holds the memory.
        core: Any = getattr(self._llm.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()
        del self._llm
        self._folder.cleanup()

    def _prompt(self, tokens: list[int]) -> Any:
        return self._vllm.TokensPrompt(prompt_token_ids=tokens)

    def _params(self, new_tokens: int) -> Any:
        return self._vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
