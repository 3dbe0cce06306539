"""Greedy continuations by llama.cpp, as golden files: what tests/real/test_against_llama_cpp.py
holds the engine to.

    LLAMA_CPP_LIB_PATH=<folder with libllama.so> python make_golden.py <folder with the .gguf files>

Needs `llama-cpp-python` (its Python files; the library may be any build of the llama.cpp that it
carries). For each model and each prompt it stores the prompt's ids, 64 greedily chosen ids, and at
each step the five largest logits: the margin by which the choice was made. Keys and values are kept
in float32 and flash attention is off, so what differs from exact arithmetic is how llama.cpp
quantizes activations.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 3, 5, 8, 13,",
    "Die Hauptstadt von Deutschland ist",
    "SELECT name, price FROM products WHERE",
]
MODELS = [
    "smollm2-135m-instruct-q4_1.gguf",
    "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b-q4.gguf",
]
NUM_TOKENS = 64
TOP = 5


def main(models: Path) -> None:
    llama_cpp.llama_backend_init()
    for name in MODELS:
        golden = {
            "made_by": f"llama-cpp-python {llama_cpp.__version__}",
            "model": name,
            "continuations": continuations(models / name),
        }
        path = Path(__file__).with_name(name.replace(".gguf", ".json"))
        path.write_text(
            json.dumps(golden, indent=None, separators=(",", ":")).replace(
                '{"prompt"', '\n{"prompt"'
            )
            + "\n"
        )
        print(path)


def continuations(path: Path) -> list[dict[str, Any]]:
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    num_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = (
        512,
        512,
        512,
        2,
        2,
    )
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = 0  # disabled
    found: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        context = llama_cpp.llama_init_from_model(model, params)
        buffer = (llama_cpp.llama_token * 256)()
        text = prompt.encode()
        count = llama_cpp.llama_tokenize(vocab, text, len(text), buffer, 256, True, False)
        ids = list(buffer[:count])
        chosen: list[int] = []
        top: list[list[list[float]]] = []
        step = ids
        for _ in range(NUM_TOKENS):
            tokens = (llama_cpp.llama_token * len(step))(*step)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(step))):
                raise RuntimeError("llama_decode failed")
            pointer = llama_cpp.llama_get_logits_ith(context, -1)
            logits = np.ctypeslib.as_array(
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (num_vocab,)
            )
            best = np.argsort(-logits, kind="stable")[:TOP]
            chosen.append(int(best[0]))
            top.append([[int(i), round(float(logits[i]), 4)] for i in best])
            step = chosen[-1:]
        llama_cpp.llama_free(context)
        found.append({"prompt": prompt, "prompt_token_ids": ids, "token_ids": chosen, "top": top})
    llama_cpp.llama_model_free(model)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
