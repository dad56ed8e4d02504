"""All candidates of a closed set scored at once, through the prefixes they share: OFA's all-candidate evaluation."""

from ofakern.generate.candidates.best import best_candidates, score_candidates
from ofakern.generate.candidates.numbering import CandidateSet

__all__ = ["CandidateSet", "best_candidates", "score_candidates"]
