"""Look at what the model thought: the likeliest tokens at each position, with probabilities.

python examples/logprobs.py [MODEL]
"""

import math
import sys

from pellucid import LLM, SamplingParams


def main(model: str = "smollm2-135m-instruct") -> None:
    llm = LLM(model, progress=True)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=4)
    output = llm.generate("The capital of France is", params, use_tqdm=False)[0]
    completion = output.outputs[0]
    for token_id, candidates in zip(completion.token_ids, completion.logprobs or [], strict=True):
        by_rank = sorted(candidates.values(), key=lambda candidate: candidate.rank)
        shown = [f"{c.decoded_token!r} {math.exp(c.logprob):6.1%}" for c in by_rank]
        print(f"{candidates[token_id].decoded_token!r:>12}   of   {'   '.join(shown)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
