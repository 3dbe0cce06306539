"""A tokenizer with more tokens than the model has rows in its embedding: Gemma 3's text models, and
fine-tunes to which a padding token was added.
"""

from pathlib import Path

import pytest

from pellucid import LLM, SamplingParams
from pellucid.errors import ConfigError, RequestError
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf


def with_tokens(source: Path, path: Path, kind: int, **changes: object) -> Path:
    """The tiny model with one token more than it has embeddings; 1 is a normal one, 3 control."""
    with GGUFFile.open(source) as file:
        metadata = dict(file.metadata)
        for key, value in (("tokens", "<pad>"), ("token_type", kind)):
            listed = metadata[f"tokenizer.ggml.{key}"]
            assert isinstance(listed, list)
            metadata[f"tokenizer.ggml.{key}"] = [*listed, value]
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        write_gguf(path, metadata, ((name, file.tensor(name)) for name in file.tensors))
    return path


def test_a_special_token_without_an_embedding_is_refused_only_where_it_is_used(
    tiny_path: Path, tmp_path: Path, backend: str
) -> None:
    with LLM(tiny_path, backend=backend) as llm:
        expected = llm.generate("hello", SamplingParams(max_tokens=5, temperature=0))
        size = llm.model_config.vocab_size
    with LLM(with_tokens(tiny_path, tmp_path / "m.gguf", kind=3), backend=backend) as llm:
        assert llm.tokenizer.vocab_size == size + 1 == llm.model_config.vocab_size + 1
        greedy = SamplingParams(max_tokens=5, temperature=0)
        same = llm.generate("hello", greedy)
        assert same[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
        for prompt in ("a<pad>b", {"prompt_token_ids": [1, size]}):
            with pytest.raises(RequestError, match=f"token id {size} is outside the vocabulary"):
                llm.generate(prompt, greedy)
        assert llm.generate({"prompt": "a<pad>b", "parse_special": False}, greedy)
        for params in ({"logit_bias": {size: 1.0}}, {"stop_token_ids": [size]}):
            with pytest.raises(ConfigError, match=f"holds token id {size}"):
                llm.generate("a", SamplingParams(**params))
        assert llm.generate("a", SamplingParams(max_tokens=3, bad_words=["<pad>"]))


def test_an_end_of_sequence_without_logits_is_never_sampled_and_breaks_nothing(
    tiny_path: Path, tmp_path: Path, backend: str
) -> None:
    path = with_tokens(tiny_path, tmp_path / "m.gguf", kind=3, eos_token_id=261)
    with LLM(path, backend=backend) as llm:
        assert llm.tokenizer.eos_token_ids >= {llm.model_config.vocab_size}
        params = SamplingParams(max_tokens=6, min_tokens=6, temperature=0)
        assert len(llm.generate("hello", params)[0].outputs[0].token_ids) == 6


def test_a_tokenizer_of_another_model_is_refused(
    tiny_path: Path, tmp_path: Path, backend: str
) -> None:
    message = "the tokenizer cuts text into 262 tokens, and the model has only 261"
    with pytest.raises(ConfigError, match=message):
        LLM(with_tokens(tiny_path, tmp_path / "m.gguf", kind=1), backend=backend)
    path = with_tokens(tiny_path, tmp_path / "n.gguf", kind=3, bos_token_id=261, add_bos_token=True)
    with pytest.raises(ConfigError, match=message):
        LLM(path, backend=backend)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_cut(
    tiny_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_path, backend=backend) as llm:

        def fail(*_: object, **__: object) -> list[int]:
            raise AssertionError("the text was cut into tokens")

        text = "x" * 10_000_000
        with monkeypatch.context() as patch:
            patch.setattr(llm.tokenizer, "encode", fail)
            for call in (llm.generate, llm.stream):
                with pytest.raises(
                    RequestError, match="the text has 10000000 characters; 96 tokens"
                ):
                    call(text)
        # cut to its last tokens, any prompt fits
        params = SamplingParams(max_tokens=2, truncate_prompt_tokens=8)
        assert llm.generate("x" * 100_000, params)[0].outputs
        assert llm.generate("x" * 100_000, SamplingParams(max_tokens=2), truncate_prompt_tokens=8)
