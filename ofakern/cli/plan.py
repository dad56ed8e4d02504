"""`ofakern plan "<instruction>"`: the plan as a table or as JSON; exit code 2 and a caret for a malformed one."""

from __future__ import annotations

import argparse
import json

from ofakern.plan import build_plans

_EPILOG = """examples:
  ofakern plan "[IMAGE:img] what does the image describe? -> [TEXT:cap]"
  ofakern plan "[IMAGE:img] [TEXT:q] -> [TEXT:a,closed_set]" --json
  ofakern plan "[IMAGE:img] what are the objects in the image? -> ([BOX:box] [TEXT:label])*"

The language: ofakern/instruction/README.md. Quote the instruction, the shell must not read it; write
`ofakern plan -- "->[TEXT:t]"` when it begins with a dash and holds no blank."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="print the plan of an instruction",
        description="Print what an instruction becomes: slots, preprocessors, adaptors, loss, generator, postprocess.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("instruction", help='one line, e.g. "[TEXT:src] -> [TEXT:tgt]"; ||| between alternatives')
    parser.add_argument("--json", action="store_true", help="JSON: one object, or a list for several alternatives")
    parser.add_argument(
        "--image-adaptor", metavar="NAME", help="adaptor of IMAGE slots that name none (default: image_resnet)"
    )


def run(args: argparse.Namespace) -> int:
    plans = build_plans(args.instruction, default_image_adaptor=args.image_adaptor)
    if args.json:
        data = [plan.to_dict() for plan in plans]
        print(json.dumps(data[0] if len(data) == 1 else data, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(plan.table() for plan in plans))
    return 0
