"""Sections of the report that show samples: features, reconstructions, saliency, cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from mics_fast.common.errors import InputError
from mics_fast.common.files import printable
from mics_fast.data.loaders import PairBatch
from mics_fast.data.manifest import Row
from mics_fast.evaluation.answers import answer
from mics_fast.inference.explanation import explain
from mics_fast.reporting import figures, pictures
from mics_fast.reporting.parts import Subject, grid, section, strip, text
from mics_fast.training.pictures import reconstruct

CASES = 4
EXAMPLES = 2


def features(subject: Subject) -> str:
    """Draw the input of the last head on its two principal components."""
    classifier, rows = subject.assessment.classifier, subject.assessment.rows
    read, opinions = pictures.collect_features(classifier.model, classifier.loader(rows))
    there = opinions.present[:, -1]
    if there.sum() < 3:
        return section("Features", text("Fewer than three samples have this opinion."))
    points, share = pictures.principal_components(read[there])
    figure = figures.scatter(
        f"Features of the {classifier.heads[-1]} head by class",
        f"first principal component ({share[0]:.0%} of the variance)",
        f"second principal component ({share[1]:.0%})",
        points.numpy(), opinions.label[there].numpy(), classifier.classes,
    )  # fmt: skip
    return section("Features", grid(figure))


def reconstructions(subject: Subject) -> str:
    """Show images, their visible patches, and the decoder's predictions."""
    run, manifest = subject.run, subject.assessment.manifest
    try:
        model = pictures.load_pretrained(run, manifest)
    except InputError as error:
        return section("Reconstructions", text(f"Not shown: {error}."))
    if model is None:
        return section("Reconstructions", text("This run started without pre-training."))
    batch = example_batch(subject)
    ratio = run.config.pretrain.mask_ratio
    shown = []
    for column, name in enumerate(manifest.modalities):
        three = reconstruct(model, batch.views[name].cpu(), batch.sample_id.cpu(), ratio, column)
        for row, own in enumerate(three):
            if batch.present[row, column]:
                low, high = own.image.min().item(), own.image.max().item()
                sample = subject.assessment.rows[row].id
                shown.append(
                    strip(f"{name} of {sample}", {
                        kind: pictures.picture(getattr(own, kind), low, high)
                        for kind in ("image", "masked", "predicted")
                    })
                )  # fmt: skip
    return section(
        "Reconstructions",
        text(
            f"{ratio:.0%} of the patches are hidden; the decoder guesses them up to their mean and "
            "contrast, which are shown as they truly are. Colours are scaled to each image."
        ),
        grid(*shown),
    )


def example_batch(subject: Subject) -> PairBatch:
    """Load the first test rows."""
    return next(iter(subject.assessment.classifier.loader(subject.assessment.rows[:EXAMPLES])))


def cases(subject: Subject) -> str:
    """Show the samples that are most worth reviewing."""
    fused = subject.assessment.opinions.fused()
    wrong = fused.wrong().nonzero()[:, 0].tolist()
    order = fused.uncertainty.argsort(descending=True, stable=True).tolist()
    surest_wrong = [row for row in reversed(order) if row in set(wrong)][:CASES]
    shown = [*order[:CASES], *surest_wrong]
    explained = explanations(subject, shown) if subject.explains and subject.frames else {}
    explainer = text(
        "Orange: patches where a small change of the pixels moves the fused answer most (absolute "
        "gradient), from the median of each image on; black borders are left out. Per cent: the "
        "image's share of all gradient of the sample. It shows what the answer depends on, not "
        "that it is right."
    )
    parts = [
        explainer if explained else "",
        "<h3>Most uncertain</h3>",
        grid(*(case(subject, row, explained) for row in order[:CASES])),
        "<h3>Wrong with the least uncertainty</h3>",
        grid(*(case(subject, row, explained) for row in surest_wrong))
        if surest_wrong
        else text("No answer is wrong."),
    ]
    return section("Cases", *parts)


def short(name: str) -> str:
    """Shorten a long id for a heading; the caption below the images has it in full."""
    name = printable(name)
    return name if len(name) <= 24 else f"{name[:10]}…{name[-10:]}"


def explanations(subject: Subject, positions: Sequence[int]) -> dict[int, dict[str, str]]:
    """Explain the answers about some rows: row number in the manifest -> title -> data URI."""
    rows = [subject.assessment.rows[position] for position in dict.fromkeys(positions)]
    drawn = {}
    for row, found in explain(subject.assessment.classifier, rows):
        total = sum(own.weight.sum().item() for own in found.values())
        drawn[row.index] = {
            f"{name}: {own.weight.sum().item() / max(total, 1e-12):.0%}": pictures.overlay(own)
            for name, own in found.items()
        }
    return drawn


def case(subject: Subject, position: int, explained: Mapping[int, dict[str, str]]) -> str:
    """Show the images of one sample, the answer, and the belief of every opinion."""
    row: Row = subject.assessment.rows[position]
    classes = subject.assessment.classifier.classes
    point = subject.assessment.classifier.point
    (record,) = answer(subject.assessment.opinions.row(position), [row.id], classes, point)
    images, unread = {}, []
    for name, file in row.files.items():
        if file is not None and subject.frames:
            title = f"virtual {name}" if name in row.virtual else name
            try:
                images[title] = pictures.thumbnail(file)
            except InputError:  # a bad file that the run skips
                unread.append(name)
    images |= explained.get(row.index, {})
    stated = {"fused": record, **record["views"]}
    belief = {
        name: {**own["belief"], "uncommitted": own["uncertainty"]} for name, own in stated.items()
    }
    truth = classes[row.label]
    title = (
        f"{short(row.id)}: answered {record['class']}, truth {truth}; uncertainty "
        f"{record['uncertainty']:.2f}, conflict {record['conflict']:.2f}"
    )
    frames = strip(f"frames of {row.id}", images) if images else ""
    if unread:
        frames += text(f"Not shown, since it cannot be decoded: {', '.join(unread)}.")
    return (
        f'<article class="case"><h4>{escape(title)}</h4>{frames}'
        + figures.belief_table(belief, truth, "Belief of each opinion; uncommitted = uncertainty")
        + "</article>"
    )
