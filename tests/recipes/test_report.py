"""The report says what the numbers say, favourable or not."""

import copy
import re
from html.parser import HTMLParser

import pytest

from layerdrop_fast.recipes import report

ENTRY = {
    "schedule": "DropSchedule(num_layers=4, depth=linear(p_max=0.4), time=constant())",
    "scale": "inverse",
    "sampling": "bernoulli",
    "steps": 100,
    "layers_run": 400.0,
    "share_of_layers_run": 1.0,
    "training_curve": [[50, 3.0, 4.0], [100, 2.0, 4.0]],
}
TRAINING = {"steps": 100, "d_model": 64, "nhead": 2, "dim_feedforward": 256, "context": 64, "batch": 12}
TRAINING |= {"learning_rate": 4e-3, "weight_decay": 0.1, "seed": 0}
VERSIONS = {"layerdrop_fast": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "device": "cpu"}


def metrics(dense=(2.0, 2.4, 3.0, 4.0), layerdrop=(2.1, 2.2, 2.5, 3.0), bigram=3.5):
    curves = {"dense": dense, "layerdrop": layerdrop}
    models = {
        name: copy.deepcopy(ENTRY) | {"bits_per_byte": {str(len(curve) - i): bits for i, bits in enumerate(curve)}}
        for name, curve in curves.items()
    }
    models["layerdrop"] |= {"steps": 125, "layers_run": 404.0, "share_of_layers_run": 404 / 500}
    text = {"name": "a <b> & c", "train_bytes": 1000, "validation_bytes": 200, "scored_bytes": 100}
    return {
        "settings": {"layers": 4, "dense": TRAINING, "layerdrop": TRAINING | {"steps": 125}, **VERSIONS},
        "text": text | {"bigram_bits_per_byte": bigram},
        "models": models,
        "machine": "a machine, 2 cores",
        "threads": 2,
        "seconds": {"train dense": 61.2, "train layerdrop": 70.8},
    }


def said(**changes):
    return " ".join(report.findings(metrics(**changes)))


def test_who_is_better_at_which_depth():
    found = said()
    assert "With all 4 layers LayerDrop is 0.100 bits/byte worse than dense." in found
    assert "1 to 3 layers: LayerDrop is better; 4 layers: dense is better." in found
    assert "Cut to half (2 of 4 layers), dense loses 1.00 bits/byte, LayerDrop 0.40" in found


def test_an_unfavourable_result_is_said_as_plainly():
    found = said(layerdrop=(2.5, 2.9, 3.3, 4.1))
    assert "With all 4 layers LayerDrop is 0.500 bits/byte worse" in found
    assert "1 to 4 layers: dense is better." in found


def test_a_difference_within_the_spread_is_no_victory():
    found = said(layerdrop=(1.99, 2.2, 2.5, 4.01))
    assert "the two are equal within" in found
    assert "1 layer: about equal; 2 to 3 layers: LayerDrop is better; 4 layers: about equal." in found


def test_the_distance_to_the_bigram_model_is_said_and_judged():
    assert "Dense reaches 2.000 bits/byte, 43% below the bigram model's 3.500." in said()
    assert "LayerDrop reaches 2.100 bits/byte, 40% below the bigram model's 3.500." in said()
    assert "Dense reaches 2.000 bits/byte, 9% below the bigram model's 2.200: short of the 15%" in said(bigram=2.2)
    assert "Dense reaches 2.000 bits/byte, 25% above the bigram model's 1.600: short of the 15%" in said(bigram=1.6)


def test_the_shallowest_depth_below_the_bigram_model():
    assert "beat the bigram model: dense 2, LayerDrop 1." in said()
    assert "beat the bigram model: dense none, LayerDrop none." in said(bigram=1.0)


def test_the_work_is_said():
    found = said()
    assert "dense ran 400 layers in 100 steps, LayerDrop 404 in 125: 101.0% of dense's work, 81%" in found
    assert "dense trained for 61 s, LayerDrop for 71 s" in found


def test_one_layer_alone_can_be_reported():
    found = said(dense=(2.0,), layerdrop=(2.1,))
    assert "retraining, 1 layer: dense is better." in found
    assert "Cut to half" not in found


def test_the_table_has_every_depth():
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([+-][\d.]+)$", report.depth_table(metrics()), re.MULTILINE)
    assert rows[0] == ("4", "2.000", "2.100", "+0.100")
    assert [row[0] for row in rows] == ["4", "3", "2", "1"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("price", [None, "rule  step\n<dense>  1.0"])
def test_the_page_is_whole_and_needs_nothing_else(price):
    files = report.files(metrics(), price)
    assert set(files) == {"report.html", "depth.png", "training.png"}
    assert all(files[name].startswith(b"\x89PNG") and len(files[name]) > 5000 for name in ("depth.png", "training.png"))
    page = Page(files["report.html"].decode())
    assert page.open == []
    assert len(page.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "a <b> & c" in page.text
    assert all(sentence in page.text for sentence in report.findings(metrics()))
    assert ("<dense>" in page.text) == (price is not None)


def test_the_same_metrics_give_the_same_files():
    assert report.files(metrics(), None) == report.files(metrics(), None)


def test_the_summary_holds_table_findings_and_prices():
    text = report.summary(metrics(), "the prices")
    assert report.depth_table(metrics()) in text
    assert "the prices" in text
    assert all(sentence in text for sentence in report.findings(metrics()))
    assert "the prices" not in report.summary(metrics(), None)
