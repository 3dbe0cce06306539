"""Token ids by llama.cpp and prompts by transformers, as golden files: what
tests/real/test_tokenizer_real.py holds the tokenizer to.

    LLAMA_CPP_LIB_PATH=<folder with libllama.so> python make_golden.py <folder with the .gguf files>

Needs `llama-cpp-python` (its Python files; the library may be any build of the llama.cpp that it
carries), `transformers` and `gguf`. For each model and each text of a nasty corpus: the ids with
control tokens taken for text ("plain") and for what they are ("special"), and the tokens that
llama.cpp takes for the end of an answer ("ends"). For each model with a chat template: the prompts
that conversations make.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

MODELS = [
    "smollm2-135m-instruct-q4_1.gguf",
    "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b-q4.gguf",
]

CORPUS = [
    "",
    " ",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "The quick brown fox jumps over the lazy dog. 1234567890",
    # emoji: plain, joined, with skin tones, flags, variation selectors
    "😀😃 👩🏽‍🚀👨‍👩‍👧‍👦 🇫🇷🇩🇪 ❤️ ☺︎ 1️⃣",
    "a😀b👍🏿c",
    # scripts
    "你好，世界。今天天气很好！二三四",
    "こんにちは世界。カタカナとひらがな、漢字。",
    "안녕하세요 세계, 반갑습니다",
    "Привет, мир! Ёлка и ёж",
    "مرحبا بالعالم، كيف الحال؟ َُِّ",
    "שלום עולם! \u200fימין לשמאל\u200e left",
    "हिन्दी में क्या हाल है? ไทยสวัสดี தமிழ்",
    "Ελληνικά: Ω ά ΐ · ΣΊΣΥΦΟΣ",
    "ß İ ı ǅ ﬁ ﬂ Å K Ω ª º ʰ ᵃ Ａ Ｂ １ ２ ½ ² ③ Ⅷ ٣٤٥ १२३",
    "𝐀𝓫ℂ 𐍈𐌰 𓀀𓂀 𒀀 🄰 \U000e0041\U000e007f",
    # combining marks: composed, decomposed, stacked; signs that normalization would change
    "\u00e9 e\u0301 \u00c5 A\u030a \u212b \u00f1 n\u0303 \u1ec7 e\u0323\u0302 \u2126 \u212a "
    "\ufb01 \u1e9b\u0323",
    "z\u0338\u0322\u031ba\u0335l\u0336g\u0337o\u0338 "
    "t\u0334\u0321\u035de\u0337x\u0336\u0328t\u0335",
    # contractions in any case, apostrophes of any kind
    "I'm you're he'll we've they'd don't it's I'M YOU'RE HE'LL WE'VE THEY'D DON'T IT'S",
    "I’m don’t ‘quoted’ “double” 'single' 's 't 'x y'all o'clock rock'n'roll",
    # numbers
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,234,567.89 1e-9 0xDEADBEEF 2026-01-31 12:34:56",
    "a1b22c333d4444 $100 50% #1 №5 v1.2.3",
    # white space: runs, mixtures, all kinds of lines and spaces
    "  two   three    four     five",
    "a" + " " * 17 + "b" + " " * 33 + "c" + " " * 70,
    "\n",
    "\n\n",
    "\n\n\n a \n\n b\n \n\n\n\n\n\n\n\nc",
    "\t\ttabs\t \t mixed \t\n\t\n  \t x",
    "line\r\nline\r\rline\n\r\n",
    " \n \n  \n   x",
    "nbsp\u00a0thin\u2009ideographic\u3000zero\u200bwidth\u2028line\u2029para\u0085next\ufeffbom",
    "a \nb  \nc\t\nd \t \n",
    "\n" * 40 + "x" + "\t" * 40 + "y",
    # control characters
    "nul\x00soh\x01bel\x07esc\x1b[31mdel\x7f\x80\x9f",
    "".join(map(chr, range(32))),
    # code
    "def f(x):\n    return [i**2 for i in range(x) if i % 2 == 0]  # ünïcode\n\n\nclass "
    "A:\n\tpass\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]*c[i];}//!=<=>=&&||->::\n#include <stdio.h>\n",
    "SELECT * FROM `t` WHERE a='b''c' AND d=\"e\" -- comment\n",
    '{"key": [1, 2.5, null, true], "s": "a\\nb\\u00e9"}',
    "<html><body class='x'><b>bold</b><br/>&nbsp;&amp;</body></html>",
    "$E=mc^2$ \\frac{a}{b} \\sum_{i=0}^{\\infty} x_i",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Windows\\System32",
    "foo_bar FooBar fooBAR FOO_BAR foo-bar --option=value",
    "==== ---- **** ____ ~~~~ #### .... !!!! ???? ;;;; ,,,,",
    "((((((([[[[[[[{{{{{{{<<<<<<<",
    # what looks like a special token, and is one for some model
    "<s>hello<|im_end|>\n<|im_start|>user<|endoftext|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<bos><eos><pad><unk><mask>",
    "<|eot_id|><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|><tool_call></tool_call>",
    "<|im_end|",
    "< |im_end|> <|im_end |> <||im_end||> <|IM_END|>",
    "<0x0A><0xFF><0x00> <unused0><unused1> [PAD] [UNK] [INST] <<SYS>>",
    "<|im_start|><|im_start|><|im_end|><|im_end|>",
    # letters that vocabularies write bytes and spaces with
    "Ġ Ċ ĉ ▁ ▁▁ a▁b ▁▁▁c Ġthe ĠĠ",
    # invalid bytes, as decoding with replacement leaves them; private and unassigned characters
    "bad \ufffd\ufffd bytes \ufffd",
    "\ue000\uf8ff \ufdd0 \uffff \U0010ffff \u0378",
    # long words
    "a" * 1000,
    "ab" * 500 + "!" * 200,
    "x1y2" * 250,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "漢" * 300,
    "😀" * 100,
]

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What is 2+2? \n"}],
    [
        {"role": "user", "content": "Say <|im_end|> in French 🇫🇷."},
        {"role": "assistant", "content": "« <|im_end|> »\n"},
        {"role": "user", "content": ""},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tells the "weather" of a <city>, é',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def main(models: Path) -> None:
    llama_cpp.llama_backend_init()
    for name in MODELS:
        golden: dict[str, Any] = {
            "made_by": f"llama-cpp-python {llama_cpp.__version__}, "
            f"transformers {transformers.__version__}",
            "model": name,
            **token_ids(models / name),
            "chats": prompts(models / name),
        }
        path = Path(__file__).with_name(name.replace(".gguf", ".json"))
        text = json.dumps(golden, separators=(",", ":"))
        path.write_text(
            text.replace('{"text"', '\n{"text"').replace('{"messages"', '\n{"messages"') + "\n"
        )
        print(path)


def token_ids(path: Path) -> dict[str, Any]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)

    def encode(text: str, special: bool) -> list[int]:
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(
            vocab, ctypes.c_char_p(data), len(data), buffer, len(buffer), True, special
        )
        return list(buffer[:count])

    ends = [
        token
        for token in range(llama_cpp.llama_vocab_n_tokens(vocab))
        if llama_cpp.llama_vocab_is_eog(vocab, token)
    ]
    cases = [
        {"text": text, "plain": encode(text, False), "special": encode(text, True)}
        for text in CORPUS
    ]
    llama_cpp.llama_model_free(model)
    return {"ends": ends, "cases": cases}


def prompts(path: Path) -> list[dict[str, Any]]:
    fields = gguf.GGUFReader(path).fields
    if "tokenizer.chat_template" not in fields:
        return []
    template, tokens = (
        fields[key].contents() for key in ("tokenizer.chat_template", "tokenizer.ggml.tokens")
    )
    names = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()]
        for name in ("bos", "eos")
    }
    found = []
    for messages in CHATS:
        for tools in (None, TOOLS):
            for add in (True, False):
                options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add}
                prompt = render_jinja_template(
                    [messages], chat_template=template, **options, **names
                )[0][0]
                found.append({"messages": messages, **options, "prompt": prompt})
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
