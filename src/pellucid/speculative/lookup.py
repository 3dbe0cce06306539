"""Proposers that need no model: the next tokens are guessed from what followed the same tokens
before.

`NgramProposer` is prompt lookup: it copies what followed the longest match in the request's own
prompt and output (Saxena, github.com/apoorvumang/prompt-lookup-decoding). `SuffixProposer` lets all
matches vote, those of the process's earlier answers too, and goes on with the candidates that
agree (SuffixDecoding, arXiv:2411.04975). Both draft far; the governor cuts.
"""

from collections import OrderedDict
from collections.abc import Sequence

from ..request import Request
from .proposer import Draft
from .token_index import MAX_MATCH, Match, TokenIndex

__all__ = ["Histories", "NgramProposer", "SuffixProposer"]

_MATCH_STEPS = (2, 3, 4, 6, 9, 16, 32)  # a match shorter than the first is in bucket 0, and so on
_NUM_MATCH = len(_MATCH_STEPS) + 1
_SHARE_STEPS = (0.4, 0.7, 0.95)  # of the votes
_NUM_SHARE = len(_SHARE_STEPS) + 1
# Chances to begin with: a token behind a match of one token, or one with few of the votes, is less
# often right (log, "Speculation, cell by cell").
_PRIOR_BY_MATCH = (0.25, *[0.5] * (_NUM_MATCH - 1))
_PRIOR_BY_SHARE = (0.5, 0.7, 1.0, 1.0)  # times this

_MAX_INDEXED = 1 << 15  # tokens of a request
_MAX_ANSWERS = 1 << 16  # tokens of earlier answers, in each of two generations
MAX_DRAFT = 64  # tokens
_MAX_SALTS = 64  # groups of requests that may share answers


def _match_bucket(length: int) -> int:
    return sum(length >= step for step in _MATCH_STEPS)


_BUCKETS = [_match_bucket(n) for n in range(MAX_MATCH + MAX_DRAFT + 1)]  # by the match's length
_WEIGHTS = [1.5**n for n in range(MAX_MATCH + 1)]


class Histories:
    """The index of each running request's prompt and output. Proposers of an engine share it."""

    def __init__(self) -> None:
        self._indexes: dict[str, tuple[TokenIndex, int]] = {}

    def update(self, request: Request) -> TokenIndex:
        """Its index, with all its known tokens; of a long prompt the last."""
        found = self._indexes.get(request.request_id)
        if found is None:
            found = TokenIndex(), max(0, request.num_tokens - _MAX_INDEXED)
            self._indexes[request.request_id] = found
        index, first = found
        if first + len(index) < request.num_tokens:
            index.extend(request.token_ids(first + len(index), request.num_tokens))
        return index

    def forget(self, request: Request) -> None:
        self._indexes.pop(request.request_id, None)


class NgramProposer:
    """Copies what followed the longest match; of equal ones, the latest."""

    name = "ngram"
    priors = _PRIOR_BY_MATCH
    is_free = True

    def __init__(self, histories: Histories) -> None:
        self._histories = histories

    def propose(self, requests: Sequence[Request], limit: int) -> dict[str, Draft]:
        """See Proposer."""
        drafts: dict[str, Draft] = {}
        for request in requests:
            index = self._histories.update(request)
            found = index.own_matches()
            if found:
                best = max(found, key=lambda match: match.length)
                # where the copy reaches the end of the text, it goes on with itself: a loop
                period = len(index) - best.next
                token_ids = [index.tokens[best.next + i % period] for i in range(limit)]
                evidence = _BUCKETS[best.length : best.length + limit]
                drafts[request.request_id] = Draft(token_ids, evidence)
        return drafts

    def finish(self, request: Request) -> None:
        """See Proposer."""
        self._histories.forget(request)


class _Answers:
    """Earlier answers, one after the other. The older half is dropped when there are too many."""

    def __init__(self) -> None:
        self.generations = [TokenIndex(), TokenIndex()]  # the newer first

    def add(self, token_ids: Sequence[int]) -> None:
        """Add an answer; -1 stands behind it."""
        if len(self.generations[0]) + len(token_ids) > _MAX_ANSWERS:
            self.generations = [TokenIndex(), self.generations[0]]
        self.generations[0].extend([*token_ids[:_MAX_ANSWERS], -1])


class SuffixProposer:
    """Lets all matches vote, in the request and in earlier answers of its `cache_salt`."""

    name = "suffix"
    priors = tuple(prior * part for prior in _PRIOR_BY_MATCH for part in _PRIOR_BY_SHARE)
    is_free = True

    def __init__(self, histories: Histories) -> None:
        self._histories = histories
        self._answers: OrderedDict[str, _Answers] = OrderedDict()  # the salt used last is last

    def propose(self, requests: Sequence[Request], limit: int) -> dict[str, Draft]:
        """See Proposer."""
        drafts: dict[str, Draft] = {}
        for request in requests:
            own = self._histories.update(request)
            voters = [(own, match) for match in own.own_matches()]
            if request.cache_salt in self._answers:
                for text in self._answers[request.cache_salt].generations:
                    voters += [(text, match) for match in text.matches(own.tokens)]
            draft = _vote(voters, limit)
            if draft.token_ids:
                drafts[request.request_id] = draft
        return drafts

    def finish(self, request: Request) -> None:
        """See Proposer."""
        self._histories.forget(request)
        if request.output_token_ids:
            answers = self._answers.setdefault(request.cache_salt, _Answers())
            answers.add(request.output_token_ids)
            self._answers.move_to_end(request.cache_salt)
            if len(self._answers) > _MAX_SALTS:
                self._answers.popitem(last=False)


def _vote(voters: list[tuple[TokenIndex, Match]], limit: int) -> Draft:
    """At each place, the token with the most votes; those who gave another leave. A token more of
    a match makes a vote half as strong again.
    """
    draft = Draft()
    token_ids, evidence = draft.token_ids, draft.evidence
    standing = [(text.tokens, m.next, m.length, _WEIGHTS[m.length]) for text, m in voters]
    # Where several are left, count their votes.
    while len(standing) > 1 and len(token_ids) < limit:
        place = len(token_ids)
        votes: dict[int, float] = {}
        for tokens, start, _, weight in standing:
            token = tokens[start + place]
            votes[token] = votes.get(token, 0.0) + weight
        if len(votes) == 1:
            (chosen,) = votes
            share_bucket = _NUM_SHARE - 1
        else:
            chosen = max(votes, key=votes.__getitem__)
            share = votes[chosen] / sum(votes.values())
            share_bucket = sum([share >= step for step in _SHARE_STEPS])
            standing = [s for s in standing if s[0][s[1] + place] == chosen]
        if chosen < 0:  # most answers ended here
            return draft
        length = max([s[2] for s in standing]) + place
        token_ids.append(chosen)
        evidence.append(_BUCKETS[length] * _NUM_SHARE + share_bucket)
        standing = [s for s in standing if s[1] + place + 1 < len(s[0])]
    # Copy the last one.
    if standing:
        (tokens, start, length, _), place = standing[0], len(token_ids)
        copied = tokens[start + place : start + limit]
        if -1 in copied:  # an answer ended there
            copied = copied[: copied.index(-1)]
        token_ids += copied
        buckets = _BUCKETS[length + place : length + place + len(copied)]
        evidence += [bucket * _NUM_SHARE + _NUM_SHARE - 1 for bucket in buckets]
    return draft
