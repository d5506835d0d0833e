"""``python -m mics_fast.predict``: classify images with a trained model.

Each answer has a class and its probability, the uncertainty, the opinion of each modality, and the
conflict between the modalities. One modality suffices. A sample with an unreadable image is skipped
and gets a record of the failure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mics_fast.common.anonymity import pseudonym, read_key
from mics_fast.common.errors import InputError, SentenceParser, run_command, warn
from mics_fast.common.files import STANDARD_OUTPUT

if TYPE_CHECKING:
    from mics_fast.data.manifest import Row
    from mics_fast.evaluation.answers import Answer, Failure
    from mics_fast.inference.writers import Write


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, find the images, write and print the answers."""
    options, images = parse(arguments)
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.inference.explanation import check_explainable, write_explanations
    from mics_fast.inference.predictor import Predictor
    from mics_fast.inference.writers import Summary, json_lines, json_list, table_file

    key = read_key(options.anonymise) if options.anonymise else None
    model = Predictor.load(*options.models)
    explained = check_explainable(model.classifier) if options.explain else None
    rows = find_rows(options, images, model.modalities)
    point = model.point(options.refer_above)
    summary = Summary()
    with ExitStack() as stack:
        writers: list[Write] = [summary.add]
        if options.json:
            writers.append(stack.enter_context(json_list(options.json)))
        if options.jsonl:
            writers.append(stack.enter_context(json_lines(options.jsonl)))
        if options.csv:
            writers.append(stack.enter_context(table_file(options.csv, model.classifier)))
        for record in model.answers(rows, refer_above=options.refer_above):
            own = record if key is None else anonymous(record, key)
            for write in writers:
                write(own)
    if STANDARD_OUTPUT not in (options.json, options.jsonl, options.csv):
        summary.print(model.modalities, point)
    summary.report_failures()
    if explained:
        count = write_explanations(explained, rows, options.explain)
        warn(f"wrote {count} pictures to {options.explain}")


def anonymous(record: Answer | Failure, key: bytes) -> Answer | Failure:
    """Replace the id by its pseudonym, and a failure's reason, which names a file, by another."""
    name = pseudonym(key, record["id"])
    if "error" in record:
        return {"id": name, "error": "an image of this sample cannot be read"}
    return {**record, "id": name}


def find_rows(
    options: argparse.Namespace, images: dict[str, Path], modalities: Sequence[str]
) -> Sequence[Row]:
    """Find the rows of a manifest or a folder, or make the row of a single sample.

    Raises:
        InputError: a file or folder is missing, empty, or of a modality unknown to the model.
    """
    from mics_fast.data.manifest import read_manifest
    from mics_fast.inference.samples import folder_rows, named_rows

    if options.manifest:
        return read_manifest(options.manifest, modalities, files_exist=False).rows
    if options.folder:
        return folder_rows(options.folder, modalities)
    for name, file in images.items():
        if name not in modalities:
            raise InputError(
                f"option --{name} is unknown: the modalities of {options.models[0]} are "
                f"{', '.join(modalities)}"
            )
        if not file.exists():
            raise InputError(f"--{name} {file} does not exist, wanted an image")
    return named_rows([images], modalities)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Path]]:
    """Read the command line, and from it the images: modality -> file.

    Raises:
        InputError: an option is unknown or out of range, or the sources of images are not one.
    """
    parser = SentenceParser(
        prog="python -m mics_fast.predict",
        description=__doc__,
        epilog="One sample: one option per modality, as in --wli a.png --nbi b.png.",
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="model",
                        help="run folder, or folder of mics_fast.export; of several, such as the "
                        "folds of a cross-validation, the opinions are averaged")  # fmt: skip
    parser.add_argument("--manifest", type=Path, help="predict every row of this manifest")
    parser.add_argument("--folder", type=Path,
                        help="predict the images of a folder that holds one folder per modality: "
                        "wli/ or x_wli/, ...; files of the same stem are one sample")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write a list of answers; - is standard output")  # fmt: skip
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="write one answer per line")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table")
    parser.add_argument("--refer-above", type=float, metavar="U",
                        help="refer to a person where the uncertainty is above this; default: the "
                        "rule that evaluate --target-risk stored in the run")  # fmt: skip
    parser.add_argument("--explain", type=Path, metavar="DIR",
                        help="write one picture per image: orange where the answer depends on it "
                        "most (gradient)")  # fmt: skip
    parser.add_argument("--anonymise", type=Path, metavar="KEY_FILE",
                        help="write ids hashed with the key in this file (made if missing), "
                        "and no paths")  # fmt: skip
    options, rest = parser.parse_known_args(arguments)
    if len(rest) % 2 or not all(name.startswith("--") for name in rest[::2]):
        raise InputError(f"{' '.join(rest)} is not understood, wanted --<modality> FILE")
    images = {name[2:]: Path(file) for name, file in zip(rest[::2], rest[1::2], strict=True)}
    sources = [x for x in (options.manifest, options.folder, images) if x]
    if len(sources) != 1:
        raise InputError(
            f"there are {len(sources) or 'no'} sources of images, wanted one: --manifest FILE, "
            "--folder DIR, or --<modality> FILE for one sample"
        )
    if options.explain and options.anonymise:
        raise InputError(
            "--explain draws on frames, which may show names, wanted it without --anonymise"
        )
    if options.refer_above is not None and not 0 <= options.refer_above <= 1:
        raise InputError(f"--refer-above is {options.refer_above}, wanted a number from 0 to 1")
    return options, images


if __name__ == "__main__":
    run_command(main)
