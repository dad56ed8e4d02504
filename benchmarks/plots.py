"""Bars per case and contender, with the measured roofline as a line; SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ofakern.errors import OfakernRuntimeError

_COLORS = ("#c0392b", "#9aa5b1", "#2f6db3", "#6fa8dc", "#e0a030", "#6b8e4e", "#7d5ba6")  # ours first


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """One figure per op, phase and dtype: `<op>_<phase>_<dtype>.svg` and `.png`. Returns the paths.

    Raises OfakernRuntimeError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise OfakernRuntimeError(
            "bench: --plot must have matplotlib, got none\nTry: pip install 'ofakern[bench]'"
        ) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in results["records"]:
        groups.setdefault((record["op"], record["phase"], record["dtype"]), []).append(record)
    paths = []
    for (op, phase, dtype), records in groups.items():
        figure = _figure(op, phase, dtype, records, results)
        for suffix in ("svg", "png"):
            path = folder / f"{op}_{phase.replace('+', '_')}_{dtype}.{suffix}"
            figure.savefig(path, dpi=120)
            paths.append(path)
    return paths


def _figure(op: str, phase: str, dtype: str, records: list[dict[str, Any]], results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(r["case"] for r in records))
    names = list(dict.fromkeys(r["backend"] for r in records))
    gemm = all(r["bound"] == "gemm" for r in records)
    figure = Figure(figsize=(2.4 + 1.5 * len(cases), 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        heights = {r["case"]: r["tflops"] * 1e3 if gemm else r["roofline_pct"] for r in records if r["backend"] == name}
        places = [c + (n - (len(names) - 1) / 2) * width for c, case in enumerate(cases) if case in heights]
        label = f"ofakern ({name})" if n == 0 else name
        axes.bar(places, list(heights.values()), width, label=label, color=_COLORS[n % len(_COLORS)])
    turns = {r["case"]: r["rates"]["gemm_tflops"] * 1e3 for r in records if "gemm_tflops" in r.get("rates", {})}
    lines = _lines(results["roofline"], dtype, gemm)
    if gemm and turns:  # each case's own rate, the one that its share is of; small cases' is the run's
        (whole, _, _), *lines = lines
        ends = [c - 0.45 for c in range(len(cases))], [c + 0.45 for c in range(len(cases))]
        label = "GEMM, in turn" if len(turns) == len(cases) else "GEMM, in turn; of small cases the run's"
        axes.hlines([turns.get(case, whole) for case in cases], *ends, color="black", linewidth=1, label=label)
    for height, label, style in lines:
        axes.axhline(height, color="black", linestyle=style, linewidth=1, label=label)
    shown = [bar.get_height() for bar in axes.patches]
    if max(shown) > 20 * min(shown):  # bars begin at 0 where that shows them all
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("GFLOP/s (work of the case / p50)" if gemm else "% of the roofline (least time / p50)")
    machine = results["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    title = f"{op}, {phase}, {dtype}\n{machine['cpu']}, {threads}, {machine['date'][:10]}"
    figure.suptitle(title, fontsize="small")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _lines(roof: dict[str, Any], dtype: str, gemm: bool) -> list[tuple[float, str, str]]:
    """The roofline: GEMM rates where those bound every case, else each case's own least time, 100 %."""
    if not gemm:
        return [(100.0, "roofline", "-")]
    kinds = (("gemm_tflops", "GEMM", "-"), ("gemm_no_amx_tflops", "GEMM without AMX", "--"))
    return [(roof[k][dtype]["best"] * 1e3, label, style) for k, label, style in kinds if dtype in roof.get(k, {})]
