"""`ofakern convert SRC DST`: a checkpoint of another system becomes a saved model, every key accounted for."""

from __future__ import annotations

import argparse
from pathlib import Path

from ofakern.checkpoint import GeneralistModel
from ofakern.checkpoint.ofa_files import is_hf_folder, write_hf_folder
from ofakern.checkpoint.ofasys_files import write_ofasys_file
from ofakern.errors import OfakernValueError

_EPILOG = """examples:
  ofakern convert checkpoint_last.pt my-model --bpe gpt2-files
  ofakern convert checkpoint_last.pt my-model --bpe gpt2-files --compat ofasys --keys
  ofakern convert ofa-base my-model
  ofakern convert my-model ofa-again --to ofa_hf
  ofakern convert my-model checkpoint.pt --to ofasys

gpt2-files holds GPT-2's encoder.json and vocab.bpe, for OFA's fairseq files also dict.txt; OFA's Hugging Face folders
have their own vocab.json and merges.txt. A file is read as
data only: one that names a class or function outside a short list is refused, and they are named.
exit code 0: written, no key left over; 2: a file that cannot be read, or that does not fit."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="turn a checkpoint of OFASys or OFA into a saved model, or back",
        description="Read another system's checkpoint, print what became of every key, and write a saved model; or "
        "write a saved model in OFA's Hugging Face format or as an OFASys checkpoint file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint of OFASys or OFA, or a saved model")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder (OFASys: file) to write, not there yet")
    parser.add_argument("--bpe", type=Path, metavar="DIR", help="folder with encoder.json, vocab.bpe (default: SRC's)")
    parser.add_argument(
        "--compat", choices=["ofasys"], default="", help="keep that implementation's quirks (default: do what is right)"
    )
    parser.add_argument(
        "--to", choices=["ofakern", "ofa_hf", "ofasys"], default="ofakern", help="format to write (default: ofakern)"
    )
    parser.add_argument("--keys", action="store_true", help="print every key with what became of it")


def run(args: argparse.Namespace) -> int:
    if args.destination.exists():
        raise OfakernValueError(f"convert: DST must not be there yet, got {args.destination}")
    source: Path = args.source
    if source.is_dir() and not is_hf_folder(source):
        model = GeneralistModel.from_pretrained(source)
    else:
        model, account = GeneralistModel.from_foreign(source, bpe=args.bpe, compat=args.compat)
        if args.keys:
            print("\n".join(f"{key}: {fate}" for key, fate in sorted(account.fates.items())))
        print(account)
    if args.to == "ofa_hf":
        write_hf_folder(args.destination, model.network, model.tokenizer)
    elif args.to == "ofasys":
        tasks = {name: task.instruction for name, task in model.tasks.items()}
        write_ofasys_file(args.destination, model.network, model.tokenizer.vocabulary, tasks)
    else:
        model.save_pretrained(args.destination)
    print(f"{model} written to {args.destination}")
    return 0
