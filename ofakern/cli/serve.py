"""`ofakern serve MODEL`: a saved model behind HTTP, with a page to try it."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch

from ofakern.checkpoint import GeneralistModel
from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.serve import Engine
from ofakern.serve.request import Limits

_EPILOG = """examples:
  ofakern serve demo-output/model
  ofakern serve demo-output/model --port 8080 --threads 2 --files photos
  ofakern serve my-model --dtype bf16 --max-queue 200 --max-running 32

  curl -F instruction=caption -F img=@photo.png http://127.0.0.1:8000/v1/infer

The page at http://HOST:PORT/ tries an instruction with an image. docs/SERVING.md describes requests and answers. There
is no login: give --host an address of another interface only behind something that has one."""

DTYPES = ("f32", "bf16", "int8")
_GRACE = 30  # seconds that requests have to be answered in when the process is told to end


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer requests over HTTP with a saved model",
        description="Serve a saved model: JSON and uploads in, JSON or a stream out, many requests in one batch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder that save_pretrained or a training run wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--max-queue", type=int, default=64, metavar="N", help="most requests that wait (default: 64)")
    parser.add_argument(
        "--max-running", type=int, default=16, metavar="N", help="most requests answered together (default: 16)"
    )
    parser.add_argument("--max-body", type=float, default=32.0, metavar="MIB", help="of one request (default: 32)")
    parser.add_argument(
        "--max-pixels", type=int, default=40_000_000, metavar="N", help="of one image (default: 40000000)"
    )
    parser.add_argument("--files", type=Path, metavar="DIR", help='folder that {"file": name} reads from')
    parser.add_argument("--allow-url", action="store_true", help='fetch {"url": ...} from public addresses')
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and of ofakern")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of the weights; int8: of decoding only")


def run(args: argparse.Namespace) -> int:
    try:
        uvicorn, app = import_module("uvicorn"), import_module("ofakern.serve.app")
    except ModuleNotFoundError as error:
        raise OfakernRuntimeError(
            f"serve: {error.name} must be installed, got none\nTry: pip install 'ofakern[serve]'"
        ) from error
    if not 0 <= args.port <= 65535:
        raise OfakernValueError(f"serve: --port must be 0 to 65535, got {args.port}")
    limits = Limits(body=int(args.max_body * 2**20), pixels=args.max_pixels, files=args.files, urls=args.allow_url)
    engine = Engine(load(args), max_queue=args.max_queue, max_running=args.max_running)
    try:
        server = app.create_app(engine, limits, drain_seconds=_GRACE)
        uvicorn.run(server, host=args.host, port=args.port, log_level="info", timeout_graceful_shutdown=_GRACE)
    finally:
        engine.stop()
    return 0


def load(args: argparse.Namespace) -> GeneralistModel:
    """The model on the threads and in the type that were asked for."""
    if args.threads is not None:
        if args.threads < 1:
            raise OfakernValueError(f"serve: --threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    model = GeneralistModel.from_pretrained(args.model)
    if args.dtype == "bf16":
        model.network.to(torch.bfloat16)
    elif args.dtype == "int8":
        model.network.eval().quantize("int8")
    return model
