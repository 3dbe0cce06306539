"""Find the sentence that is nearest to a question, by the cosine of their embeddings.

python examples/embeddings.py [MODEL]

Any decoder gives embeddings. Those of a model that was trained for it are far better, such as
Qwen3-Embedding.
"""

import sys

from pellucid import LLM, PoolingParams

SENTENCES = [
    "The train to Lyon leaves at nine.",
    "Bread is baked of flour, water and salt.",
    "A violin has four strings.",
]


def main(model: str = "smollm2-135m-instruct") -> None:
    llm = LLM(model, progress=True)
    outputs = llm.embed(
        ["How is bread made?", *SENTENCES], PoolingParams(pooling="mean"), use_tqdm=False
    )
    question, *vectors = [output.outputs.embedding for output in outputs]
    for sentence, vector in zip(SENTENCES, vectors, strict=True):
        # the vectors have the length 1, so their product is the cosine
        cosine = sum(a * b for a, b in zip(question, vector, strict=True))
        print(f"{cosine:7.4f}  {sentence}")


if __name__ == "__main__":
    main(*sys.argv[1:])
