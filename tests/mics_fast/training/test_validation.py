"""Several ranks that share the rows of a validation find what one rank finds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import multiprocessing

from mics_fast.common.errors import NoUsableImage
from mics_fast.engine.distributed import share_of
from mics_fast.evaluation.opinions import collect_opinions, gather
from mics_fast.models.classifier import Classifier
from mics_fast.models.pretraining import PretrainModel
from mics_fast.training.neighbours import extract_features, joined_features
from mics_fast.training.validation import over_ranks

RANKS = 4


def score(tiny, batches):
    """Opinions about all rows and their features, from the batches of this rank's share."""
    torch.manual_seed(0)
    classifier = Classifier(tiny, ("wli", "nbi"), 3, pool="mean", fusion_depth=1)
    model = PretrainModel(tiny, ("wli", "nbi"), pool="mean", projection=8, temperature=0.07)
    own = share_of(batches) or None
    opinions = gather(over_ranks(7, own, partial(collect_opinions, classifier), shared=True))
    extract = partial(extract_features, model, autocast=None)
    features = joined_features(over_ranks(7, own, extract, shared=True))
    return {
        "evidence": opinions.evidence,
        "present": opinions.present,
        "label": opinions.label,
        "sample_id": opinions.sample_id,
        "features": features.values,
        "of": features.label,
    }


def score_on_a_rank(rank, tiny, batches, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found = score(tiny, batches)

    def unusable(batches):
        raise NoUsableImage("none of 1 rows has an image that can be used")

    own = share_of(batches) or None
    some = over_ranks(7, own, unusable if rank == 1 else len, shared=True)
    sentence = ""
    try:
        over_ranks(7, own, unusable, shared=True)
    except NoUsableImage as error:
        sentence = str(error)
    torch.save({**found, "some": some, "none": sentence}, folder / f"found-{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture
def batches(make_batch):
    """Three batches of seven rows in total, for four ranks: one has nothing to do."""
    return [make_batch(n, first_id=first) for n, first in ((3, 0), (3, 3), (1, 6))]


def test_ranks_that_share_the_rows_find_what_one_finds_to_the_bit(tiny, batches, tmp_path):
    multiprocessing.spawn(score_on_a_rank, (tiny, batches, tmp_path), nprocs=RANKS)
    wanted = score(tiny, batches)
    assert wanted["sample_id"].tolist() == list(range(7))
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"found-{rank}", weights_only=True)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (rank, name)
        assert found["some"] == [1, 1]  # of ranks 2 and 3; rank 0 has no rows, rank 1 no images
        assert found["none"] == "none of 7 rows has an image that can be used"
