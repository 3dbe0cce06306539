"""The lists of cases. `CASES` are small and compare a backend with the definition. `SPEED_CASES`
have the shapes of real models and are timed.

CASES cover: one token and many; sizes that no vector width divides; every format; every ratio of
query to key heads; windows shorter and longer than the context; chunks that continue a context;
ragged batches; scattered blocks of each size; rows whose results are not used; numbers that are
large enough to saturate or to overflow a careless formula.
"""

from ..formats import ALL_FORMATS, get_format
from .cases import (
    AttentionCase,
    Case,
    ElementwiseCase,
    EmbeddingCase,
    LinearCase,
    NormCase,
    RopeCase,
    TakeRowsCase,
)

__all__ = ["CASES", "SPEED_CASES"]


def _columns(format: str) -> int:
    """The length of a row: a few quant_blocks, or 72 (no multiple of 16) in dense formats."""
    return 72 if get_format(format).block_size == 1 else max(96, 2 * get_format(format).block_size)


_EMBEDDING: tuple[Case, ...] = (
    *(
        EmbeddingCase(tokens=5, vocab_size=11, hidden_size=_columns(f), format=f)
        for f in ALL_FORMATS
    ),
    EmbeddingCase(tokens=1, vocab_size=3, hidden_size=7),
    EmbeddingCase(tokens=33, vocab_size=300, hidden_size=64, format="Q8_0", scale=8.0),
    EmbeddingCase(tokens=4, vocab_size=5, hidden_size=640, scale=25.298221),
)

_LINEAR: tuple[Case, ...] = (
    *(
        LinearCase(tokens=t, in_features=_columns(f), out_features=n, format=f)
        for f in ALL_FORMATS
        for t, n in ((1, 37), (5, 48))
    ),
    LinearCase(tokens=1, in_features=1, out_features=1),
    LinearCase(tokens=1, in_features=576, out_features=1536, bias=True),
    LinearCase(tokens=9, in_features=17, out_features=1, bias=True),
    LinearCase(tokens=67, in_features=130, out_features=33),
    LinearCase(tokens=16, in_features=1536, out_features=64),
    LinearCase(tokens=3, in_features=256, out_features=20, format="Q4_K", bias=True),
    LinearCase(tokens=64, in_features=576, out_features=50, format="Q4_1"),
    LinearCase(tokens=3, in_features=64, out_features=16, magnitude=1e4),
    LinearCase(tokens=3, in_features=256, out_features=16, format="Q6_K", magnitude=1e4),
    LinearCase(tokens=6, in_features=64, out_features=40, logits_indices=(0, 3, 5)),
    LinearCase(tokens=6, in_features=64, out_features=40, logits_indices=()),
    LinearCase(tokens=6, in_features=96, out_features=40, format="Q8_0", logits_indices=(5,)),
    LinearCase(tokens=6, in_features=96, out_features=40, format="Q8_0", logits_indices=()),
)

_NORM: tuple[Case, ...] = (
    NormCase(op="rms_norm", tokens=1, width=576),
    NormCase(op="rms_norm", tokens=7, width=65, eps=1e-6),
    NormCase(op="rms_norm", tokens=3, width=1),
    NormCase(op="rms_norm", tokens=5, width=36, num_heads=3, eps=1e-6),
    NormCase(op="rms_norm", tokens=4, width=64, magnitude=1e6),
    NormCase(op="rms_norm", tokens=4, width=64, magnitude=1e-5),  # eps outweighs the mean square
    NormCase(op="rms_norm", tokens=2, width=64, magnitude=0.0),
    NormCase(op="layer_norm", tokens=1, width=768),
    NormCase(op="layer_norm", tokens=9, width=65),
    NormCase(op="layer_norm", tokens=4, width=64, magnitude=1e5),
    # here a variance by the mean of squares minus the square of the mean would lose all digits
    NormCase(op="layer_norm", tokens=4, width=64, mean=1000.0),
    NormCase(op="layer_norm", tokens=2, width=64, magnitude=0.0, mean=3.0),
)

_ELEMENTWISE: tuple[Case, ...] = (
    *(
        ElementwiseCase(op=op, tokens=t, width=w, magnitude=m)
        for op in ("add", "silu_mul", "gelu_mul", "gelu", "softcap")
        for t, w, m in (
            (1, 1536, 1.0),
            (7, 65, 1.0),
            (3, 33, 1e-4),
            (3, 33, 20.0),
            (3, 33, 1e4),
            (2, 17, 1e18),
        )
    ),
    ElementwiseCase(op="softcap", tokens=4, width=50, magnitude=100.0, cap=50.0),
    ElementwiseCase(op="all_reduce", tokens=3, width=20),
)

_TAKE_ROWS: tuple[Case, ...] = (
    TakeRowsCase(tokens=1, width=5, indices=(0,)),
    TakeRowsCase(tokens=9, width=64, indices=(0, 4, 8)),
    TakeRowsCase(tokens=9, width=64, indices=()),
    TakeRowsCase(tokens=4, width=3, indices=(0, 1, 2, 3)),
)

_ROPE: tuple[Case, ...] = (
    RopeCase(tokens=1, num_heads=9, head_dim=64, rotary_dim=64, first_position=37),
    RopeCase(tokens=20, num_heads=3, head_dim=64, rotary_dim=64),
    RopeCase(tokens=5, num_heads=2, head_dim=20, rotary_dim=20, theta=1e6),
    # the rest of the head passes
    RopeCase(tokens=5, num_heads=2, head_dim=80, rotary_dim=32, first_position=3),
    RopeCase(tokens=3, num_heads=1, head_dim=2, rotary_dim=2),
    RopeCase(
        tokens=4, num_heads=4, head_dim=128, rotary_dim=128, first_position=131_068, theta=5e5
    ),
    RopeCase(tokens=4, num_heads=2, head_dim=64, rotary_dim=64, first_position=8000, scale=1.1386),
)

_ATTENTION: tuple[Case, ...] = (
    AttentionCase(
        q_lens=(1,), seq_lens=(1,), num_heads=1, num_kv_heads=1, head_dim=1, block_size=1
    ),
    AttentionCase(
        q_lens=(12,), seq_lens=(12,), num_heads=4, num_kv_heads=4, head_dim=16, scattered=False
    ),
    AttentionCase(q_lens=(1,), seq_lens=(50,), num_heads=9, num_kv_heads=3, head_dim=64),
    *(
        AttentionCase(
            q_lens=(6, 1),
            seq_lens=(6, 19),
            num_heads=2 * g,
            num_kv_heads=2,
            head_dim=20,
            block_size=4,
        )
        for g in range(1, 9)
    ),
    *(
        AttentionCase(
            q_lens=(9, 1, 3),
            seq_lens=(9, 40, 33),
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            block_size=b,
        )
        for b in (1, 16, 32)
    ),
    *(
        AttentionCase(
            q_lens=(20, 1), seq_lens=(20, 45), num_heads=4, num_kv_heads=1, head_dim=32, window=w
        )
        for w in (1, 2, 16, 17, 44, 45, 64)
    ),
    *(
        AttentionCase(
            q_lens=(q,), seq_lens=(48,), num_heads=4, num_kv_heads=2, head_dim=16, block_size=8
        )
        for q in (2, 7, 8, 31, 47)
    ),  # chunks
    *(
        AttentionCase(
            q_lens=(q,),
            seq_lens=(48,),
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            block_size=8,
            window=10,
        )
        for q in (1, 9, 25)
    ),
    AttentionCase(
        q_lens=(1,) * 8,
        seq_lens=(1, 2, 15, 16, 17, 31, 32, 33),
        num_heads=6,
        num_kv_heads=2,
        head_dim=40,
    ),
    AttentionCase(
        q_lens=(5, 1, 17, 1),
        seq_lens=(37, 64, 17, 3),
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        scattered=False,
    ),
    AttentionCase(
        q_lens=(10, 1), seq_lens=(30, 30), num_heads=4, num_kv_heads=2, head_dim=16, softcap=50.0
    ),
    AttentionCase(
        q_lens=(10, 1),
        seq_lens=(30, 30),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        softcap=2.0,
        window=7,
        magnitude=30.0,
    ),
    AttentionCase(
        q_lens=(10, 1), seq_lens=(30, 30), num_heads=4, num_kv_heads=2, head_dim=16, magnitude=300.0
    ),  # exp(score) would overflow
    *(
        AttentionCase(
            q_lens=(9, 1, 3),
            seq_lens=(9, 300, 33),
            num_heads=6,
            num_kv_heads=2,
            head_dim=64,
            kv_dtypes=(k, v),
        )
        for k, v in (
            ("f32", "f32"),
            ("f16", "f16"),
            ("int8", "int8"),
            ("int4", "int4"),
            ("int8", "int4"),
            ("int4", "f16"),
        )
    ),
    AttentionCase(
        q_lens=(5,),
        seq_lens=(40,),
        num_heads=4,
        num_kv_heads=2,
        head_dim=20,
        kv_dtypes=("int8", "int8"),
    ),
    AttentionCase(
        q_lens=(1, 5),
        seq_lens=(600, 40),
        num_heads=2,
        num_kv_heads=2,
        head_dim=96,
        window=90,
        kv_dtypes=("int4", "int4"),
    ),
    AttentionCase(
        q_lens=(7, 2), seq_lens=(7, 21), num_heads=3, num_kv_heads=1, head_dim=13, block_size=3
    ),
    AttentionCase(
        q_lens=(8,), seq_lens=(1100,), num_heads=2, num_kv_heads=1, head_dim=64, block_size=32
    ),
    # split and merged
    AttentionCase(
        q_lens=(2, 1), seq_lens=(4099, 9000), num_heads=2, num_kv_heads=1, head_dim=8, block_size=32
    ),
    AttentionCase(
        q_lens=(3,),
        seq_lens=(9000,),
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        block_size=16,
        window=5000,
    ),
)

CASES: tuple[Case, ...] = (
    *_EMBEDDING,
    *_LINEAR,
    *_NORM,
    *_ELEMENTWISE,
    *_TAKE_ROWS,
    *_ROPE,
    *_ATTENTION,
)


def _speed_cases(tokens: int) -> tuple[Case, ...]:
    """Every op of SmolLM2-135M (C 576, F 1536, H 9, KH 3, D 64, V 49152) on `tokens` tokens, and
    the ops of GPT-2 and Gemma at the same sizes.
    """
    sizes, formats = ((576, 576), (576, 1536), (1536, 576)), ("F32", "Q4_1", "Q8_0")
    return (
        EmbeddingCase(tokens=tokens, vocab_size=49152, hidden_size=576, format="Q8_0"),
        *(
            LinearCase(tokens=tokens, in_features=i, out_features=o, format=f)
            for i, o in sizes
            for f in formats
        ),
        LinearCase(tokens=tokens, in_features=1536, out_features=576, format="Q4_K"),
        LinearCase(
            tokens=tokens,
            in_features=576,
            out_features=49152,
            format="Q8_0",
            logits_indices=(tokens - 1,),
        ),
        NormCase(op="rms_norm", tokens=tokens, width=576),
        NormCase(op="layer_norm", tokens=tokens, width=576),
        ElementwiseCase(op="add", tokens=tokens, width=576),
        ElementwiseCase(op="silu_mul", tokens=tokens, width=1536),
        ElementwiseCase(op="gelu_mul", tokens=tokens, width=1536),
        ElementwiseCase(op="gelu", tokens=tokens, width=1536),
        RopeCase(tokens=tokens, num_heads=9, head_dim=64, rotary_dim=64),
        *(
            AttentionCase(
                q_lens=(tokens,), seq_lens=(s,), num_heads=9, num_kv_heads=3, head_dim=64, window=w
            )
            for s, w in ((512, None), (2048, None), (2048, 512), (8192, None))
        ),
    )


SPEED_CASES: tuple[Case, ...] = (
    *_speed_cases(1),  # decode
    *_speed_cases(512),  # a chunk of a prompt
    # decode of a batch
    AttentionCase(q_lens=(1,) * 16, seq_lens=(512,) * 16, num_heads=9, num_kv_heads=3, head_dim=64),
)
