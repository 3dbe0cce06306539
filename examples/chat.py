"""Hold a conversation and print each answer as it grows. The second turn sees the first.

python examples/chat.py [MODEL]
"""

import sys

from pellucid import LLM, SamplingParams

QUESTIONS = ["What is water made of?", "At what temperature does it boil?"]


def main(model: str = "smollm2-135m-instruct") -> None:
    llm = LLM(model, progress=True)
    params = SamplingParams(temperature=0, max_tokens=48)
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        shown = ""
        for output in llm.chat_stream(messages, params):
            text = output.outputs[0].text  # the answer so far
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
        print()
        # The tokens of this turn stay in the prefix cache: the next one computes its own only.
        messages.append({"role": "assistant", "content": shown})


if __name__ == "__main__":
    main(*sys.argv[1:])
