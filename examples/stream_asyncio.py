"""Stream many answers at once from asyncio. Leaving a loop early ends its request.

python examples/stream_asyncio.py [MODEL]
"""

import asyncio
import sys

from pellucid import AsyncEngine, SamplingParams

PROMPTS = ["One, two, three,", "Monday, Tuesday,", "Red, orange, yellow,"]


async def answer(engine: AsyncEngine, prompt: str) -> str:
    """Read one answer up to its first full stop."""
    text = ""
    async for output in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=32)):
        text = output.outputs[0].text
        if "." in text:
            break  # the engine frees what the request held
    return prompt + text


async def main(model: str = "smollm2-135m-instruct") -> None:
    # Loading takes a moment: a server does it before its event loop starts, or in a thread.
    async with await asyncio.to_thread(AsyncEngine.load, model, progress=True) as engine:
        for text in await asyncio.gather(*(answer(engine, prompt) for prompt in PROMPTS)):
            print(text)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
