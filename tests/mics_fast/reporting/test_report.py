"""The report: one page without requests, opened in a browser if there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch

from mics_fast import evaluate, report
from mics_fast.common.anonymity import pseudonym
from mics_fast.data.manifest import read_manifest
from mics_fast.engine.log import read_log
from mics_fast.evaluation.tables import SHOWN, interval, number
from mics_fast.models.masked_autoencoder import random_mask
from mics_fast.models.pretraining import PretrainModel
from mics_fast.reporting import pictures
from mics_fast.training.pictures import reconstruct

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(trained_run, phantom_manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    report.main(
        [str(trained_run), "--out", str(out), "--resamples", "5", "--against", str(trained_run),
         "--out-of-distribution", str(phantom_manifest)]
    )  # fmt: skip
    return out


def test_the_numbers_of_the_page_are_those_of_evaluate(page, trained_run, tmp_path):
    file = tmp_path / "metrics.json"
    evaluate.main([str(trained_run), "--resamples", "5", "--json", str(file)])
    views = json.loads(file.read_text())["views"]
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text())
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    shown = {unescape(own[0]): own[1:] for own in cells if len(own) == 5}
    for name, title in SHOWN.items():
        if name in views["fused"] and name != "out_of_distribution_auroc":
            fused, ends, wli, nbi = shown[title]
            found = [number(views[view].get(name)) for view in ("fused", "wli", "nbi")]
            assert [fused, wli, nbi] == found, name
            assert ends == interval(views["fused"]["intervals"].get(name)), name


def test_the_page_has_every_section(page):
    html = page.read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Cases", "Does it know when it is wrong?", "Referral to a person", "Metrics",
        "Confusion matrix", "Training", "Features", "Reconstructions",
        "Configuration and environment",
    ]  # fmt: skip
    for caption in (
        "pretrain: losses", "finetune: throughput", "finetune: time that waited for data",
        "Reliability of the fused probabilities", "Risk and coverage",
        "Uncertainty of right and wrong answers", "Uncertainty in and out of distribution",
        "Features of the fusion head by class", "This run minus", "vit_nano",
    ):  # fmt: skip
        assert caption in html, caption
    assert "Not a medical device" in html and "ROC: each class against the rest" in html
    assert re.search(r"Of 100 patients like these the model is right on \d+; if it may refer", html)
    assert html.count('<article class="case">') == 8


def test_every_picture_and_figure_has_a_text_alternative(page):
    html = page.read_text()
    pictures_of = re.findall(r"<img [^>]*>", html)
    # Two examples x two modalities x three; eight cases x two frames and two overlays.
    assert len(pictures_of) == 12 + 32
    assert all(re.search(r'alt="[^"]{5,}"', tag) for tag in pictures_of)
    figures = re.findall(r'<svg viewBox="0 0 460[^>]*>', html)
    assert len(figures) >= 11 and all('aria-label="' in tag for tag in figures)


def test_the_page_asks_for_nothing(page):
    html = page.read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "default-src 'none'" in html


def browse(file, profile, *flags):
    """Open a file in headless Chromium; return its stdout and stderr."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(
    (x) => !x.closest(".wide, pre") && x.getBoundingClientRect().right > innerWidth + 1);
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth,
    wide: wide.map((x) => x.outerHTML.slice(0, 80)),
    broken: [...document.images].filter((x) => !x.naturalWidth).length,
    requests: performance.getEntriesByType("resource").map((x) => x.name)
      .filter((x) => !x.startsWith("data:")),
  }), "*");
})</script></head>"""
# In a frame, because a window is never narrower than 500 pixels.
FRAME = """<body><script>addEventListener("message", (x) => document.body.dataset.seen = x.data)
</script><iframe src="copy.html" style="width:%dpx;height:900px;border:0"></iframe></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_a_laptop_and_a_phone(page, tmp_path, width):
    # A copy that may run a script, which measures; the page itself forbids scripts.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (tmp_path / "copy.html").write_text(html.replace("</head>", PROBE))
    outer = tmp_path / "outer.html"
    outer.write_text(FRAME % width)
    shown, _ = browse(
        outer, tmp_path / "profile",
        "--window-size=1400,900", "--virtual-time-budget=10000", "--dump-dom",
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]*)"', shown)
    assert found, "the probe did not run"
    seen = json.loads(unescape(found[1]))
    assert seen["inner"] == width and seen["scroll"] <= width and seen["wide"] == []
    assert seen["broken"] == 0 and seen["requests"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_browser_has_nothing_to_complain_about(page, tmp_path):
    screenshot = tmp_path / "page.png"
    _, said = browse(page, tmp_path / "profile", f"--screenshot={screenshot}")
    assert screenshot.stat().st_size > 10_000
    assert "CONSOLE" not in said


def test_a_run_from_scratch_says_it_has_no_reconstructions(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  init: ''", "  init: none"))
    report.main([str(run), "--resamples", "2"])
    html = (run / "report" / "report.html").read_text()
    assert "This run started without pre-training." in html
    assert "--" not in re.sub(r"<(style|details)>.*?</\1>|<!--.*?-->", "", html, flags=re.S)


def test_an_anonymised_page_shows_neither_ids_nor_paths_nor_frames(
    trained_run, phantom_manifest, tmp_path
):
    key = tmp_path / "key"
    key.write_text("a secret of some length")
    out = tmp_path / "report.html"
    report.main([str(trained_run), "--out", str(out), "--resamples", "2", "--anonymise", str(key)])
    html, test = out.read_text(), read_manifest(phantom_manifest).select("test")
    assert "<img" not in html and "/" + str(phantom_manifest.parent.name) not in html
    assert str(trained_run.parent) not in html
    assert not any(row.id in html for row in test)
    hashed = [pseudonym(b"a secret of some length", row.id) for row in test]
    assert sum(f"<h4>{name}: answered" in html for name in hashed) >= 4


def test_a_reconstruction_leaves_visible_patches_as_they_are(tiny):
    torch.manual_seed(0)
    model = PretrainModel(tiny, ("wli",), pool="cls", projection=8, temperature=0.07).eval()
    images, number = torch.randn(2, 3, tiny.image, tiny.image), torch.arange(2)
    visible, _ = random_mask((0, 0), number, 0, tiny.num_patches, 0.75, 0)
    for row, own in enumerate(reconstruct(model, images, number, 0.75, 0)):
        assert torch.equal(own.image, images[row])
        for patch in range(tiny.num_patches):
            y, x = divmod(patch, tiny.image // tiny.patch)
            window = (slice(None), slice(y * tiny.patch, (y + 1) * tiny.patch),
                      slice(x * tiny.patch, (x + 1) * tiny.patch))  # fmt: skip
            true, guess = own.image[window], own.predicted[window]
            if patch in visible[row]:
                torch.testing.assert_close(guess, true, rtol=1e-4, atol=1e-4)
                assert torch.allclose(own.masked[window], true)
            else:
                assert not torch.allclose(guess, true, atol=0.1)
                assert own.masked[window].min() == own.masked[window].max()


def test_principal_components_are_numpy_s(tiny):
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    points, share = pictures.principal_components(features)
    covariance = torch.cov(features.double().T)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    assert share == pytest.approx((values[:2] / values.sum()).tolist())
    assert points.double().var(0).tolist() == pytest.approx(values[:2].tolist(), rel=1e-4)


def test_the_log_of_a_killed_run_counts_each_step_once(tmp_path):
    lines = ['{"stage": "pretrain", "step": 1, "loss": 3}', '{"stage": "pretrain", "st',
             '{"stage": "pretrain", "step": 1, "loss": 2}',
             '{"stage": "finetune", "step": 1, "loss": 1}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    log = read_log(tmp_path)
    assert [line["loss"] for line in log["pretrain"]] == [2] and len(log["finetune"]) == 1
