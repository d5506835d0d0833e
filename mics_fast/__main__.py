"""``python -m mics_fast``: which commands there are."""

from __future__ import annotations

COMMANDS = {
    "prepare": "images or a table of them -> manifest.csv, checked, split, looked at",
    "train": "manifest -> run folder: pre-training and fine-tuning",
    "evaluate": "run -> metrics with intervals, for each modality and fused",
    "predict": "run and images -> class, belief, uncertainty",
    "report": "run -> one HTML page",
    "export": "run -> ONNX and torch.export files, with a model card",
    "experiment": "manifest -> variants x label fractions x seeds, in one table",
}

if __name__ == "__main__":
    print("python -m mics_fast.<command> --help\n")
    for name, purpose in COMMANDS.items():
        print(f"  {name:11} {purpose}")
