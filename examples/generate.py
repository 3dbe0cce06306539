"""Complete several prompts at once: they share every step of the engine.

python examples/generate.py [MODEL]
"""

import sys

from pellucid import LLM, SamplingParams

PROMPTS = ["The capital of France is", "The opposite of hot is", "To make tea, first boil the"]


def main(model: str = "smollm2-135m-instruct") -> None:
    llm = LLM(model, progress=True)  # a known name is fetched at its first use
    params = SamplingParams(temperature=0, max_tokens=12)  # temperature 0: greedy
    for output in llm.generate(PROMPTS, params):
        completion = output.outputs[0]
        print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")


if __name__ == "__main__":
    main(*sys.argv[1:])
