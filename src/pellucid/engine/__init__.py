"""The engine: one loop of schedule, execute, update (`core`), the runner that feeds the model
(`model_runner`), and `LLM` on top.
"""

__all__: list[str] = []
