"""Prometheus's text format."""

from __future__ import annotations

from ofakern.serve.metrics import Registry


def test_the_page_that_prometheus_reads() -> None:
    registry = Registry()
    answered = registry.counter("answers_total", "Answers.", "outcome")
    plain = registry.counter("steps_total", "Steps.")
    registry.gauge("queue", "Waiting.", lambda: 3)
    seconds = registry.histogram("seconds", "Time.", (0.1, 1.0))
    answered.add(label="ok")
    answered.add(2, label="failed")
    plain.add(2.5)
    for value in (0.05, 0.1, 0.5, 30.0):
        seconds.observe(value)
    assert registry.text().splitlines() == [
        "# HELP answers_total Answers.",
        "# TYPE answers_total counter",
        'answers_total{outcome="failed"} 2',
        'answers_total{outcome="ok"} 1',
        "# HELP steps_total Steps.",
        "# TYPE steps_total counter",
        "steps_total 2.5",
        "# HELP queue Waiting.",
        "# TYPE queue gauge",
        "queue 3",
        "# HELP seconds Time.",
        "# TYPE seconds histogram",
        'seconds_bucket{le="0.1"} 2',
        'seconds_bucket{le="1"} 3',
        'seconds_bucket{le="+Inf"} 4',
        "seconds_sum 30.65",
        "seconds_count 4",
    ]
    assert answered.value("failed") == 2 and answered.value("other") == 0
