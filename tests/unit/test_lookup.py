"""Proposers that need no model: drafts are what followed the same tokens before."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.request import Request
from pellucid.sampling_params import SamplingParams
from pellucid.speculative import Speculation, build_proposers
from pellucid.speculative.lookup import Histories, NgramProposer, SuffixProposer
from pellucid.speculative.proposer import Proposer
from pellucid.speculative.token_index import MAX_MATCH, TokenIndex


def request(tokens: list[int], output: list[int] | None = None, **fields: str) -> Request:
    made = Request(
        request_id=fields.pop("request_id", "a"),
        prompt_token_ids=tokens,
        params=SamplingParams(),
        seed=0,
        **fields,  # type: ignore[arg-type]
    )
    made.output_token_ids = output or []
    return made


def longest_match(tokens: list[int]) -> int:
    """How many of the last tokens stand somewhere before, by trying all places."""
    best = 0
    for stop in range(1, len(tokens)):
        length = 0
        while length < min(stop, MAX_MATCH) and tokens[stop - 1 - length] == tokens[-1 - length]:
            length += 1
        best = max(best, length)
    return best


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(1, 9), max_size=9))
def test_matches_are_places_with_the_same_last_tokens(tokens: list[int], cuts: list[int]) -> None:
    index = TokenIndex()
    for cut in cuts:  # it grows by parts
        index.extend(tokens[len(index) : len(index) + cut])
    index.extend(tokens[len(index) :])
    found = index.matches(tokens)
    for match in found:
        assert 1 <= match.length <= MAX_MATCH and match.next < len(tokens)
        assert tokens[match.next - match.length : match.next] == tokens[-match.length :]
    assert bool(found) == (longest_match(tokens) >= 1)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=16))
def test_the_longest_match_is_copied(tokens: list[int]) -> None:
    """In a text so short, all places are candidates."""
    drafts = NgramProposer(Histories()).propose([request(tokens)], 5)
    best = longest_match(tokens)
    if not best:
        assert drafts == {}
        return
    draft = drafts["a"]
    assert len(draft.token_ids) == len(draft.evidence) == 5
    joined = tokens + draft.token_ids
    place = [
        stop
        for stop in range(best, len(tokens))
        if tokens[stop - best : stop] == tokens[-best:]
        and joined[stop : stop + 5] == draft.token_ids
    ]
    assert place


def test_a_loop_is_continued() -> None:
    draft = NgramProposer(Histories()).propose([request([9, 1, 2, 3, 1, 2, 3, 1, 2, 3])], 7)["a"]
    assert draft.token_ids == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("proposer", [NgramProposer(Histories()), SuffixProposer(Histories())])
def test_nothing_is_drafted_where_nothing_was_seen_before(proposer: Proposer) -> None:
    for tokens in ([], [1], [1, 2], list(range(100))):
        assert proposer.propose([request(tokens)], 8) == {}
        proposer.finish(request(tokens))


def test_longer_matches_and_more_of_them_are_better_evidence() -> None:
    proposer = NgramProposer(Histories())
    short = proposer.propose([request([1, 2, 7, 9, 1, 2], request_id="short")], 1)["short"]
    text = list(range(20))
    long = proposer.propose([request([*text, 55, *text], request_id="long")], 1)["long"]
    assert long.evidence[0] > short.evidence[0]
    # two of three went on with 7, or two of two
    split = [3, 1, 2, 7, 4, 1, 2, 7, 5, 1, 2, 8, 6, 1, 2]
    draft = SuffixProposer(Histories()).propose([request(split)], 1)["a"]
    alike = SuffixProposer(Histories()).propose([request([3, 1, 2, 7, 4, 1, 2, 7, 5, 1, 2])], 1)[
        "a"
    ]
    assert draft.token_ids == alike.token_ids == [7]
    assert alike.evidence[0] > draft.evidence[0]


@pytest.mark.parametrize(
    ("tokens", "is_verified"), [([1, 2, 9, 1, 3, 9, 1, 4, 9, 1], False), ([1, 2, 9] * 4, True)]
)
def test_weak_evidence_is_trusted_less_from_the_start(tokens: list[int], is_verified: bool) -> None:
    """Of four requests whose rows cost what they cost at first, tokens with a third of the votes
    are not worth a row before anything was observed.
    """
    speculation = Speculation(build_proposers("suffix"), 100)
    requests = [request(tokens, request_id=name) for name in "abcd"]
    for each in requests:
        each.is_decoding = True
    speculation.observe(requests, {name: [5] for name in "abcd"}, 1.0)
    speculation.propose(requests, lambda: 0.0)
    assert any(each.draft_token_ids for each in requests) is is_verified


def test_earlier_answers_are_remembered_within_their_salt() -> None:
    proposer = SuffixProposer(Histories())
    answer = [5, 6, 7, 8, 9, 10]
    ended = request([1], answer, cache_salt="mine")
    proposer.propose([ended], 4)
    proposer.finish(ended)
    same = request([5, 6, 7], request_id="b", cache_salt="mine")
    other = request([5, 6, 7], request_id="c", cache_salt="theirs")
    drafts = proposer.propose([same, other], 4)
    assert drafts["b"].token_ids == [8, 9, 10]  # and the answer ended there
    assert "c" not in drafts


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.speculative.lookup._MAX_ANSWERS", 100)
    monkeypatch.setattr("pellucid.speculative.lookup._MAX_INDEXED", 50)
    monkeypatch.setattr("pellucid.speculative.lookup._MAX_SALTS", 3)
    proposer, rng = SuffixProposer(Histories()), random.Random(0)
    for i in range(40):
        ended = request([rng.randrange(9) for _ in range(80)], request_id=str(i))
        ended.cache_salt = str(i % 5)
        proposer.propose([ended], 4)
        ended.output_token_ids += [rng.randrange(9) for _ in range(rng.choice((1, 30, 300)))]
        proposer.finish(ended)
    assert len(proposer._answers) == 3
    for answers in proposer._answers.values():
        assert all(len(text) <= 101 for text in answers.generations)
    assert not proposer._histories._indexes
    long = request(list(range(60)))
    assert len(proposer._histories.update(long)) == 50
    long.output_token_ids += [1, 2]
    assert len(proposer._histories.update(long)) == 52
