"""`stagevar-eval pairs`: a blind A/B page from two folders of images."""

from __future__ import annotations

import argparse
import json

from stagevar.cli.arguments import existing_folder, existing_path, file_value, name_value, positive_int, whole_number
from stagevar.files import write_text_atomically, writing
from tuner.evalkit.delivery import Verbs, add_verb, deliver

_HELP = """\
Send the page, keep the key. Voters press 1, 2 or T and save their answers to a file, which
`stagevar-eval preference --key KEY.json --answers ANSWERS.json ...` reads."""


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "pairs", "make a blind A/B page from two folders of images", _HELP)
    verb.add_argument(
        "--a",
        type=existing_folder,
        required=True,
        metavar="DIR",
        help="images of A, with prompts if it has GenEval's layout",
    )
    verb.add_argument("--b", type=existing_folder, required=True, metavar="DIR", help="images of B, same names")
    verb.add_argument("--page", type=file_value, required=True, metavar="FILE.html", help="the page to write")
    verb.add_argument(
        "--key", type=file_value, metavar="FILE.json", help="the key to write (default: beside the page, .key.json)"
    )
    verb.add_argument("--prompts", type=existing_path, metavar="FILE", help="prompts, if A's folder has none")
    verb.add_argument("--count", type=positive_int, help="number of pairs (default: all)")
    verb.add_argument(
        "--seed", type=whole_number, default=0, help="seed of choice, order and sides (default %(default)s)"
    )
    verb.add_argument("--question", type=name_value, default="Which image is better?", help="heading of the page")
    verb.set_defaults(run=run, inputs=("prompts",), outputs=("page", "key", "out"))


def run(options: argparse.Namespace) -> int:
    """Writes the page and its key."""
    from tuner.evalkit.image_folder import match_references, read_folder
    from tuner.evalkit.user_study import build_study

    images = read_folder(options.a, options.prompts)
    study = build_study(
        images, match_references(images, options.b), count=options.count, seed=options.seed, question=options.question
    )
    page, key = options.page, options.key
    for path, text in ((page, study.page), (key, json.dumps(study.key, indent=2) + "\n")):
        with writing(path):
            write_text_atomically(path, text)
    results = {"page": str(page), "key": str(key), "pairs": len(study.key["pairs"]), "study": study.key["study"]}
    lines = [f"{results['pairs']} pairs: send {page}, keep {key}"]
    return deliver(options, results, lines, [page, key])
