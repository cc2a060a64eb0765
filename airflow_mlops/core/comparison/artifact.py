"""Artifact: whether a packaged model can be run at all, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_mlops.core.comparison.promotion import Check, Outcome

#: Seconds measuring may take: at least, after the longest start allowed, and where any is.
_LEAST_SECONDS, _AFTER_START_SECONDS, _NO_LIMIT_SECONDS = 120.0, 90.0, 3_600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactLimits:
    """What a packaged model may cost; ``None`` is no limit.

    :param size_mb: all files together, in 10^6 bytes.
    :param cold_start_seconds: from the start of a new process to the first answer, imports and verification included. A model
        that has not been measured 90 s after it (two minutes at least, without a limit an hour) fails.
    :param p99_milliseconds: 99th percentile of answering one row.
    :param memory_mb: peak resident memory of that process, in 10^6 bytes.
    """

    size_mb: float | None = 1_000.0
    cold_start_seconds: float | None = 30.0
    p99_milliseconds: float | None = 100.0
    memory_mb: float | None = 4_000.0

    @property
    def timeout_seconds(self) -> float:
        """How long measuring may take.

        >>> ArtifactLimits().timeout_seconds, ArtifactLimits(cold_start_seconds=300.0).timeout_seconds
        (120.0, 390.0)
        """
        if self.cold_start_seconds is None:
            return _NO_LIMIT_SECONDS
        return max(_LEAST_SECONDS, self.cold_start_seconds + _AFTER_START_SECONDS)


#: Answers a 99th percentile is taken of, unless they take too long.
FULL_ANSWERS = 450


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactFacts:
    """What it did cost, in the units of :class:`ArtifactLimits`.

    :param timed_answers: answers whose time was taken; of fewer than 100 the 99th percentile is the longest.
    """

    size_mb: float
    cold_start_seconds: float
    p99_milliseconds: float
    memory_mb: float
    timed_answers: int = FULL_ANSWERS


_WORDS = {
    "size_mb": "{:.3g} MB on disk",
    "cold_start_seconds": "{:.2g} s to the first answer",
    "p99_milliseconds": "{:.2g} ms for a row (p99)",
    "memory_mb": "{:.0f} MB of memory",
}


def judge_artifact(facts: ArtifactFacts, limits: ArtifactLimits) -> Check:
    """Hold the costs against the limits.

    >>> facts = ArtifactFacts(size_mb=2.0, cold_start_seconds=1.0, p99_milliseconds=0.5, memory_mb=90.0)
    >>> judge_artifact(facts, ArtifactLimits(memory_mb=64.0)).reason
    'the packaged model takes 90 MB of memory (limit 64)'
    """
    over, within = [], []
    for name, words in _WORDS.items():
        value, limit = getattr(facts, name), getattr(limits, name)
        text = words.format(value)
        if name == "p99_milliseconds" and facts.timed_answers < FULL_ANSWERS:
            text = text.replace("p99", f"p99 of {facts.timed_answers}")
        if limit is not None and value > limit:
            over.append(f"{text} (limit {limit:g})")
        else:
            within.append(text)
    if over:
        return Check(
            name="artifact", outcome=Outcome.FAIL, reason=f"the packaged model takes {', '.join(over)}"
        )
    return Check(
        name="artifact", outcome=Outcome.PASS, reason=f"the packaged model takes {', '.join(within)}"
    )
