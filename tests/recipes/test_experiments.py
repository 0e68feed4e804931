"""The experiments: what is trained and measured, and what is told of it."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from layerdrop_fast.prune import every_other, extract, prune_ffn_chunks, prune_heads
from layerdrop_fast.recipes.evaluation import bits_per_token
from layerdrop_fast.recipes.experiments import __main__ as command
from layerdrop_fast.recipes.experiments import measures, runs, summary
from layerdrop_fast.recipes.experiments.runs import NETWORKS
from layerdrop_fast.recipes.pool import read_results
from layerdrop_fast.recipes.text import from_file, validation_windows
from layerdrop_fast.recipes.training import DENSE, ModelSize, Recipe, Training, train
from layerdrop_fast.schedule import uniform

ROOT = Path(__file__).parents[2]
SMALL = ModelSize(num_layers=4, d_model=16, nhead=4, dim_feedforward=32, context=16)
TEXT = b"the quick brown fox jumps over the lazy dog. " * 600
BYTES = np.frombuffer(TEXT, dtype=np.uint8)
WINDOWS = validation_windows(BYTES, count=8, length=17)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(runs, "WINDOWS", 8)
    monkeypatch.setattr(measures, "SEARCHED", 2)
    monkeypatch.setattr(measures, "SEARCHED_THROUGH", 2)


def trained(recipe=DENSE):
    return train(Training(SMALL, recipe, 12, batch=2), BYTES)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_trained_and_measured(name, text, few):
    found = runs.run(name, 0, text, 12, SMALL)
    network = NETWORKS[name]
    assert set(found["curve"]) == {"4", "3", "2", "1"}
    wanted = {"strategies": network.strategies, "halves": network.layers, "parts": network.parts}
    wanted["importance"] = network.layers
    assert {measure: measure in found for measure in wanted} == wanted
    assert 0 < found["share_of_layers_run"] <= 1
    steps = round(12 / network.recipe.density(4)) if network.equal_work else 12
    assert found["settings"]["steps"] == steps
    assert json.loads(json.dumps(found)) == found


def test_every_half_is_measured_of_one_seed(text, few):
    found = runs.measured(NETWORKS["dense"], trained(), from_file(text), SMALL, seed=1)
    assert "importance" in found
    assert "halves" not in found


def test_what_chooses_layers_does_not_judge_them(text, few, monkeypatch):
    seen, corpus = {}, from_file(text)
    for name in ("strategies", "halves", "importance"):
        monkeypatch.setattr(measures, name, lambda *given, name=name: seen.update({name: given}))
    runs.measured(NETWORKS["dense"], trained(), corpus, SMALL, seed=0)
    scored = validation_windows(corpus.validation, count=8, length=17)
    for windows in (seen["strategies"][2:], seen["halves"][1:], seen["importance"][1:2]):
        assert all(map(np.array_equal, windows, (scored[::2], scored[1::2])))


def test_the_seed_is_trained_with():
    assert runs.training_of("dense", 7, 12).seed == 7


def test_importance_is_of_what_was_scored(few):
    model = trained().model
    found = measures.importance(model, WINDOWS, seed=0)
    halves = {keep: bits_per_token(extract(model, keep), WINDOWS[:2]) for keep in combinations(range(4), 2)}
    assert found["kept"] == 2
    for layer, values in enumerate(found["values"]):
        assert sorted(values) == pytest.approx(sorted(bits for keep, bits in halves.items() if layer not in keep))


def test_strategies_choose_half_and_are_judged_on_other_windows(few):
    made = trained(Recipe(uniform(0.5), learned=True))
    found = measures.strategies(made.model, made.learned, WINDOWS[::2], WINDOWS[1::2])
    kept = {name: row["keep"] for name, row in found.items()}
    assert kept["every other"] == [0, 2]
    assert kept["first half"] == [0, 1]
    assert kept["last half"] == [2, 3]
    assert kept["data-driven"] == made.learned.keep(2)
    for row in found.values():
        assert row["bits"] == pytest.approx(bits_per_token(extract(made.model, row["keep"]), WINDOWS[1::2]))
    searched = found["search"]
    chosen = bits_per_token(extract(made.model, searched["keep"]), WINDOWS[::2][:2])
    assert searched["chosen_on"] == pytest.approx(chosen)
    assert chosen <= bits_per_token(extract(made.model, [0, 2]), WINDOWS[::2][:2]) + 1e-9


def test_every_half_is_scored_and_the_best_is_judged_on_other_windows(few):
    model = trained().model
    found = measures.halves(model, WINDOWS[::2], WINDOWS[1::2])
    bits = {keep: bits_per_token(extract(model, keep), WINDOWS[::2][:2]) for keep in combinations(range(4), 2)}
    ranked = sorted(bits, key=bits.__getitem__)
    assert found["candidates"] == 6
    assert (found["layers_run"], found["layers_asked"]) == (9, 12)  # C(5, 2) - 1 prefixes
    assert found["best"]["keep"] == list(ranked[0])
    assert found["every other"]["keep"] == [0, 2]
    assert found["every other"]["rank"] == ranked.index((0, 2)) + 1
    assert found["best"]["value"] == pytest.approx(bits[ranked[0]])
    assert found["worst"] == pytest.approx(bits[ranked[-1]])
    assert found["median"] == pytest.approx((bits[ranked[2]] + bits[ranked[3]]) / 2)
    without = [np.mean([value for keep, value in bits.items() if layer not in keep]) for layer in range(4)]
    assert found["without"] == pytest.approx(without)
    for row in (found["best"], found["every other"]):
        assert row["held_out"] == pytest.approx(bits_per_token(extract(model, row["keep"]), WINDOWS[1::2]))


def test_without_every_other_branch_the_others_compute_what_they_did():
    model = trained().model.eval()
    tokens = torch.from_numpy(WINDOWS)
    expected = model.token_embedding(tokens[:, :16]) + model.position_embedding.weight[:16]
    for number, layer in enumerate(model.stack.layers):
        h = layer.norm2(expected) if number % 2 else layer.norm1(expected)
        if number % 2:
            expected = expected + layer.linear2(torch.nn.functional.gelu(layer.linear1(h)))
        else:
            attend, _ = layer.attention(h, None, is_causal=True)
            attended = layer.self_attn.attend_to_itself(h, None, attend, False, None)
            expected = expected + layer.self_attn.out_proj(attended)
    found = measures.without_every_other_branch(model)(tokens[:, :16])
    torch.testing.assert_close(found, model.head(model.norm(expected)), rtol=1e-4, atol=1e-4)


def test_half_of_every_kind_of_part_is_taken_out():
    model = trained().model
    found = measures.parts(model, WINDOWS)
    assert found["nothing"] == pytest.approx(bits_per_token(model, WINDOWS))
    assert found["layers"] == pytest.approx(bits_per_token(extract(model, every_other(4, kept=2)), WINDOWS))
    heads = prune_heads(model, [0, 2])
    cut = {"heads": heads, "chunks": prune_ffn_chunks(model, [0, 2, 4, 6]), "layers and heads": extract(heads, [0, 2])}
    cut["branches and heads"] = measures.without_every_other_branch(heads)
    assert {name: found[name] for name in cut} == pytest.approx({n: bits_per_token(m, WINDOWS) for n, m in cut.items()})
    assert len(set(found.values())) == 7


def result(network, seed, bits, **more):
    curve = {"2": bits, "1": bits + 1}
    settings = {"steps": 1200}
    return {
        "network": network,
        "seed": seed,
        "curve": curve,
        "settings": settings,
        "share_of_layers_run": 0.8,
        "bigram": 3.5,
        **more,
    }


def test_tables_have_means_and_deviations():
    strategies = {"every other": {"bits": 2.5}, "search": {"bits": 2.25}}
    halves = {
        "candidates": 12870,
        "layers_run": 24309,
        "layers_asked": 102960,
        "best": {"value": 2.0, "held_out": 2.25},
        "every other": {"value": 2.125, "held_out": 2.375, "rank": 1200},
        "median": 3.5,
        "worst": 9.0,
        "without": [4.0, 3.0, 3.5, 3.5],
    }
    results = [
        result("layers 0.2", 1, 2.5, strategies=strategies),
        result("layers 0.2", 0, 2.0, strategies=strategies),
        result("dense", 0, 3.0, parts={"nothing": 3.0, "heads": 3.25}, halves=halves),
    ]
    lines = summary.tables(results).splitlines()
    assert "| network | seeds | steps | layers run | 2 layers |" in lines
    assert "| dense | 1 | 1,200 | 80% | 3.000 |" in lines
    assert "| layers 0.2 | 2 | 1,200 | 80% | 2.250 ± 0.354 |" in lines
    assert "| layers 0.2 | 2.500 ± 0.000 | 2.250 ± 0.000 | +0.250 |" in lines
    assert "| dense | 3.000 | 3.250 |" in lines
    row = "| dense | 2.000 | 2.125 | 1,200 of 12,870 | 3.500 | 9.000 | 2.250 | 2.375 "
    assert f"{row}| 0 (+0.500), 2 (+0.000), 3 (+0.000) | 24,309 of 102,960 |" in lines


def test_plots_are_of_what_there_is():
    importance = {"kept": 1, "values": [[3.0], [2.0, 2.5]]}
    results = [result("dense", 0, 3.0, importance=importance), result("2026 recipe, equal work", 0, 2.5)]
    found = summary.plots(results)
    assert set(found) == {"recipe.png", "importance.png"}, "dense alone is no comparison"
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    assert set(summary.plots([*results, result("layers 0.2", 0, 2.5)])) == {"depth.png", "recipe.png", "importance.png"}
    assert set(summary.plots(results[1:])) == {"recipe.png"}


def test_importance_is_drawn_over_all_seeds(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        summary, "plot_importance", lambda found, draw=summary.plot_importance: drawn.update(found) or draw(found)
    )
    seeds = ({"kept": 1, "values": [[3.0], [2.0, 2.5]]}, {"kept": 1, "values": [[4.0], [5.0]]})
    summary.plots([result("dense", seed, 3.0, importance=found) for seed, found in enumerate(seeds)])
    assert drawn["dense"].means == pytest.approx([3.5, 9.5 / 3])
    assert drawn["dense"].kept == 1


def test_plots_show_what_is_not_much_worse_than_bigrams(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        summary, "plot_curves", lambda curves, draw=summary.plot_curves: drawn.append(draw(curves)) or drawn[-1]
    )
    summary.plots([result("dense", 0, 30.0), result("layers 0.2", 0, 3.0)])
    assert drawn[0].get_ylim()[1] == pytest.approx(1.5 * 3.5)


def test_the_command_does_what_is_missing_and_reports(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.json"
    arguments = [f"--out={out}", "--text", str(text), "--steps", "2", "--jobs", "1", "--seeds", "0"]
    assert command.main([*arguments, "--networks", "heads 0.2"]) == 0
    content = json.loads(out.read_text())
    assert [run["network"] for run in content["results"]] == ["heads 0.2"]
    told = content["provenance"]["command"].partition("experiments ")[2]
    assert told == "--out results.json --text text --steps 2 --seeds 0 --networks 'heads 0.2'"
    first = capsys.readouterr().out
    assert "| heads 0.2 | 1 | 2 |" in first
    assert command.main([*arguments, "--networks", "heads 0.2"]) == 0
    assert json.loads(out.read_text())["results"] == content["results"]
    assert command.main([*arguments, "--report", str(tmp_path / "plots")]) == 0
    assert "| heads 0.2 | 1 | 2 |" in capsys.readouterr().out
    content["results"].append({**content["results"][0], "text": {"name": "another", "sha256": "0"}})
    out.write_text(json.dumps(content))
    assert command.main([*arguments, "--report", str(tmp_path / "plots")]) == 2
    assert "got results of ['another (0), 2 steps', 'text (" in capsys.readouterr().err
    content["results"][1]["text"] = {"name": "text", "sha256": "another"}
    out.write_text(json.dumps(content))
    assert command.main([*arguments, "--report", str(tmp_path / "plots")]) == 2
    assert "expected those of one text and number of steps" in capsys.readouterr().err
    for nothing, named in ((5, "expected a list of objects"), ([1], "expected a list"), ([{}], "without 'text'")):
        out.write_text(json.dumps({"results": nothing}))
        assert command.main([*arguments, "--report", str(tmp_path / "plots")]) == 2
        assert named in capsys.readouterr().err
    out.write_text("[]")
    assert command.main([*arguments, "--report", str(tmp_path / "plots")]) == 2
    assert "results.json is no file of results" in capsys.readouterr().err


def rows_of(text):
    results = read_results(ROOT / f"benchmarks/results/cpu-2core/experiments-{text}.json")
    assert all(result["machine"] for result in results)
    return summary.tables(summary.comparable(results))


@pytest.mark.parametrize("text", ["austen", "stdlib", "overfitted"])
def test_the_page_shows_what_was_measured(text):
    page = (ROOT / "docs/experiments.md").read_text()
    assert f"<!-- {text} -->\n{rows_of(text)}\n<!-- /{text} -->" in page


def test_the_page_shows_dense_networks_that_were_trained_for_less():
    page = (ROOT / "docs/experiments.md").read_text()
    for steps in ("1,000", "2,000"):
        (row,) = (
            line for line in rows_of(f"overfitted-{steps.replace(',', '')}").splitlines() if f"| {steps} |" in line
        )
        assert row in page
