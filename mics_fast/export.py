"""``python -m mics_fast.export``: write a run's classifier to files that do not need mics-fast.

model.pt2       ``torch.export`` program
model.onnx      the same for ONNX Runtime, if the [export] extra is installed
model.json      names of inputs and outputs, preprocessing, agreement with the original
MODEL_CARD.md   data, metrics with intervals, limits
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import SentenceParser, run_command
from mics_fast.common.files import make_folder, write_json, write_text
from mics_fast.evaluation import RESAMPLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a run, compare the files with the original, and describe them."""
    parser = SentenceParser(prog="python -m mics_fast.export", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of mics_fast.train")
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported model")
    parser.add_argument("--resamples", type=int, default=RESAMPLES,
                        help="of the bootstrap behind the model card's intervals")  # fmt: skip
    parser.add_argument("--anonymise", action="store_true",
                        help="leave names of files and folders out of the model card")  # fmt: skip
    options = parser.parse_args(arguments)
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.inference.export import export_model, sidecar
    from mics_fast.inference.exported_classifier import CARD, SIDECAR
    from mics_fast.inference.model_card import model_card
    from mics_fast.inference.run_classifier import load_run
    from mics_fast.training.run import Run

    run = Run.open(options.run)
    classifier = load_run(run)
    make_folder(options.out)
    agreement = export_model(classifier, options.out)
    write_json(options.out / SIDECAR, sidecar(classifier, agreement))
    card = model_card(classifier, agreement, options.resamples, paths=not options.anonymise)
    write_text(options.out / CARD, card)
    for name, largest in agreement.items():
        print(f"wrote {options.out / name}: differs from the original by at most {largest:.1e}")


if __name__ == "__main__":
    run_command(main)
