"""The rules of ofakern/ops/dispatch.py that kept GPU results justify. `python -m benchmarks.dispatch` prints them.

A kernel gets a rule for a dtype when every case of every kept h200-*.json, forward and backward, shows it right, faster
than the reference (or the reference out of memory) and not slower than our other kernel. The rule covers the widths and
lengths between the smallest and the largest of those cases; what lies outside was not measured.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.core import DTYPES
from benchmarks.gpu import BACKENDS, REFERENCE
from ofakern.ops.dispatch import Rule

RESULTS = Path(__file__).with_name("results")
CAPABILITIES = {"H200": (9, 0)}


def kept() -> dict[str, Mapping[str, Any]]:
    """The results of GPUs under benchmarks/results, by file name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("h200-*.json"))}


def table(results: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Rule, ...]]:
    """Rules by op, as `ofakern.ops.dispatch.TABLE` has them."""
    groups: dict[tuple[str, str, tuple[int, int]], list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    wrong: set[tuple[str, str, str]] = set()  # op, dtype and backend
    for name, result in results.items():
        capability = next(value for gpu, value in CAPABILITIES.items() if gpu in result["machine"]["gpu"])
        wrong |= {(words[0], words[2], words[3].rstrip(":")) for words in (line.split() for line in result["wrong"])}
        for record in result["records"]:
            groups[record["op"], record["dtype"], capability].append((name, record))
    rules: dict[str, tuple[Rule, ...]] = {}
    for (op, dtype, capability), records in sorted(groups.items()):
        for backend in BACKENDS:
            ours = [(name, record) for name, record in records if record["backend"] == backend]
            if (op, dtype, backend) not in wrong and ours and all(_wins(record) for _, record in ours):
                widths, lengths = zip(*(record["size"] for _, record in ours), strict=True)
                rule = Rule(backend, capability, DTYPES[dtype], _span(widths), _span(lengths), ours[-1][0])
                rules[op] = (*rules.get(op, ()), rule)
    return rules


def _wins(record: Mapping[str, Any]) -> bool:
    """Ties between our kernels go to both: the first of BACKENDS is asked first."""
    versus = record["versus"]
    return bool(versus.get(REFERENCE, 2.0) > 1.0 and all(versus.get(other, 1.0) >= 1.0 for other in BACKENDS))


def _span(values: Iterable[int]) -> tuple[int, int]:
    found = sorted(values)
    return found[0], found[-1]


if __name__ == "__main__":
    for op, rules in table(kept()).items():
        print(f'    "{op}": (')
        for rule in rules:
            print(f"        {rule!r},")
        print("    ),")
