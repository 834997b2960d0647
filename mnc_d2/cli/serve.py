"""Show what a model finds in images that are dropped on a web page.

The page has a slider for the score, what each pass of the cascade found, and the results as COCO JSON. It loads nothing
from the network, and images are not kept on the disk. It needs Flask and waitress: pip install 'mnc_d2[serve]'.
"""

from __future__ import annotations

import argparse
import os
import socket

from ..predictor import load_predictor
from .common import add_model_arguments, add_overrides, overrides

EXAMPLE = "  mnc serve output/nuclei/model_best.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 127.0.0.1, this machine, by default")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default; 0 for any that is free")
    parser.add_argument("--max-megapixels", type=float, default=16, metavar="N", help="of an image; 16 by default")
    parser.add_argument("--max-megabytes", type=float, default=32, metavar="N", help="of its file; 32 by default")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Serve the page until the process is interrupted."""
    try:
        import waitress

        from ..serve import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("flask", "waitress"):
            raise
        raise ValueError("The page needs Flask and waitress: pip install flask waitress") from error
    with _listen(args.host, args.port) as listening:
        predictor = load_predictor(
            args.model,
            device=args.device,
            config=args.config,
            overrides=["MODEL.MNC.OUTPUTS", "('instances', 'passes')", *overrides(args)],
        )
        title = os.path.join(*os.path.abspath(args.model).split(os.sep)[-2:])
        app = create_app(predictor, title, args.max_megapixels, args.max_megabytes)
        server = waitress.create_server(app, sockets=[listening])
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listening.getsockname()[1]}/ shows {args.model}; Ctrl+C ends it.", flush=True)
        server.run()  # until Ctrl+C


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Port {port} of {host} cannot be had ({reason}). Choose another by --port.") from error
