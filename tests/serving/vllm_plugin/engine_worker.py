"""Runs in vLLM's environment: one vLLM engine after another, one for each request of `engine.Engine`.

Started as a script. A request is a line of JSON on stdin, its answer a line of JSON on stdout; vLLM's own output goes
to stderr. Importing vLLM takes most of a minute, so one process serves all the tests.
"""

import gc
import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that what it raises is seen here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


def answer(request: dict) -> dict:
    """Prompt and generated log-probabilities over the whole vocabulary, greedy tokens, and the KV cache's size."""
    import numpy as np
    from vllm import LLM, SamplingParams

    inspect_here()
    llm = LLM(
        model=request["model"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        block_size=32,
        max_logprobs=-1,
        kv_cache_memory_bytes=request["kv_cache_bytes"],
        **{"dtype": "float32", **request["options"]},
    )
    try:
        refused = [_reload(llm, folder) for folder in request["reload"]]
        greedy = SamplingParams(
            temperature=0,
            max_tokens=request["steps"],
            ignore_eos=True,
            detokenize=False,
            logprobs=-1,
            prompt_logprobs=-1,
        )
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy, use_tqdm=False)
        cache = llm.llm_engine.vllm_config.cache_config
        arrays, tokens = {}, []
        for index, output in enumerate(outputs):
            positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]  # nothing predicts the first token
            arrays[str(index)] = np.array([[row[token].logprob for token in range(len(row))] for row in positions])
            tokens.append(list(output.outputs[0].token_ids))
        np.savez(request["out"], **arrays)
        return {"tokens": tokens, "kv_tokens": cache.num_gpu_blocks * cache.block_size, "refused": refused}
    finally:
        llm.llm_engine.engine_core.shutdown()


def inspect_here() -> None:
    """Let vLLM inspect a model's class in this process.

    On a machine where it has not done so before, it starts a process for each class, which imports all of vLLM.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def _reload(llm, folder: str) -> str:
    """What vLLM said against it; nothing when it did it."""
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    except ValueError as error:
        return str(error)
    return ""


def release() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        release()
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
