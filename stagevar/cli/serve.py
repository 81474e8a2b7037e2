"""`stagevar serve`: a profile over HTTP."""

from __future__ import annotations

import argparse

from stagevar.cli.arguments import (
    between,
    existing_file,
    name_value,
    path_value,
    positive_int,
    whole_number,
)
from stagevar.cli.model_options import (
    Verbs,
    add_model_options,
    add_running_options,
    drawing_request,
)
from stagevar.errors import UsageError


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("serve", help="serve a profile over HTTP as OpenAI's images endpoint")
    parser.add_argument("--profile", type=path_value, help="profile.yaml written by stagevar-tune")
    add_model_options(parser, required=False)
    add_running_options(parser, batch="the profile's, else 1", threads="the profile's, else torch's")
    parser.add_argument("--compare", action="store_true", help="also serve the full schedule")
    parser.add_argument(
        "--host", type=name_value, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=whole_number, default=8000, help="port to listen on; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--api-key-file", type=existing_file, help="file of API keys, one per line; requests need one of them"
    )
    parser.add_argument("--queue", type=positive_int, default=64, help="images that may wait (default: 64)")
    seconds = between(0.1, 86400)
    parser.add_argument("--timeout", type=seconds, default=60, help="seconds until a request times out (default: 60)")
    parser.add_argument(
        "--grace", type=seconds, default=30, help="seconds to finish accepted requests after SIGTERM (default: 30)"
    )
    parser.add_argument(
        "--stuck", type=seconds, default=300, help="seconds that one batch may take before /health fails (default: 300)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    from stagevar.profile import Profile
    from stagevar.serving.app import Keys, Limits
    from stagevar.serving.server import Serving, read_keys, require_packages, serve

    require_packages()
    if (args.profile is None) == (args.model is None):
        raise UsageError("give either --profile FILE or --model NAME")
    if args.compare and args.profile is None:
        raise UsageError("--compare needs --profile: a model alone is served with its full schedule")
    keys = Keys() if args.api_key_file is None else read_keys(args.api_key_file)
    limits = Limits(timeout_s=args.timeout, stuck_s=args.stuck)
    serving = Serving(args.host, args.port, args.queue, args.grace, limits, keys)
    profile = None if args.profile is None else Profile.load(args.profile)
    request = drawing_request(args, profile)
    from stagevar.serving.drawing import Loading

    loading = Loading(request, profile, args.compare, args.engine, args.batch or 0, args.threads)
    serve(loading, serving, lambda address: print(address, flush=True))
    return 0
