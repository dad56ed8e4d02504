"""The generated parts of ofakern/instruction/README.md. `python tests/plan/readme_sections.py` writes them anew."""

from __future__ import annotations

from pathlib import Path

from error_cases import ATTRIBUTES, GRAMMAR, Case

import ofakern.instruction
from ofakern.errors import InstructionError
from ofakern.modality.registry import SPECS
from ofakern.modality.spec import AttributeSpec, ModalitySpec
from ofakern.plan import build_plans

README = Path(ofakern.instruction.__file__).with_name("README.md")


def modalities() -> str:
    lines = ["| modality | preprocessors | adaptors | runs |", "|---|---|---|---|"]
    for spec in SPECS.values():
        lines.append(
            f"| {spec.modality.name} | {_names(spec, 'preprocessors')} | {_names(spec, 'adaptors')} | {_runs(spec)} |"
        )
    return "\n".join(lines)


def _names(spec: ModalitySpec, what: str) -> str:
    default = {"preprocessors": spec.default_preprocessor, "adaptors": spec.default_adaptor}[what]
    return ", ".join(f"**{name}**" if name == default else name for name in getattr(spec, what))


def _runs(spec: ModalitySpec) -> str:
    if not spec.available:
        return f"not yet: {spec.note}"
    missing = [name for name, one in {**spec.preprocessors, **spec.adaptors}.items() if not one.available]
    return "yes" + (f", without {', '.join(missing)}" if missing else "")


def attributes() -> str:
    rows: dict[tuple[str, AttributeSpec], list[str]] = {}
    for spec in SPECS.values():
        for kind in (spec.preprocessors, spec.adaptors):
            for one in kind.values():
                for attribute in one.attributes.values():
                    where = rows.setdefault((spec.modality.name, attribute), [])
                    where.extend([one.name] if one.name not in where else [])
    lines = ["| modality | attribute | type | side | of | meaning |", "|---|---|---|---|---|---|"]
    for (modality, attribute), where in rows.items():
        sides = " ".join(attribute.sides)
        meaning = attribute.meaning + (f" (no effect: {attribute.no_effect})" if attribute.no_effect else "")
        lines.append(
            f"| {modality} | `{attribute.name}` | {_type(attribute)} | {sides} | {', '.join(where)} | {meaning} |"
        )
    return "\n".join(lines)


def _type(attribute: AttributeSpec) -> str:
    low = "" if attribute.minimum is None else f" from {attribute.minimum:g}"
    high = "" if attribute.maximum is None else f" to {attribute.maximum:g}"
    return attribute.kind + low + high


def message(case: Case) -> str:
    try:
        build_plans(case.text)
    except InstructionError as error:
        return str(error)
    raise AssertionError(f"{case.text} must be refused")


def errors(cases: tuple[Case, ...]) -> str:
    return "\n\n".join(f"**{case.title}**\n\n```text\n{message(case)}\n```" for case in cases)


def sections() -> dict[str, str]:
    return {
        "modalities": modalities(),
        "attributes": attributes(),
        "grammar errors": errors(GRAMMAR),
        "attribute errors": errors(ATTRIBUTES),
    }


def filled(text: str) -> str:
    """``text`` with every generated section between its markers."""
    for name, body in sections().items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        tail = rest.split(end)[1]
        text = f"{head}{begin}\n\n{body}\n\n{end}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
