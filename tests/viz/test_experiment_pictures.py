import base64
import html
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from moe_lab import viz
from moe_lab.experiments import Results
from moe_lab.plain import to_plain
from moe_lab.presets import BASELINE_TRAINING, MOE_BASELINE
from moe_lab.train import Step
from moe_lab.viz.experiments import cures, end_of, load_over_steps
from moe_lab.viz.picture import GREY, INK, SERIES

LABELS = {"title": "a title", "x": "strength", "y": "bits per byte", "alt": "what is seen"}
EVEN, UNEVEN = [4, 4, 4, 4], [8, 4, 4, 0]
TINY = to_plain(MOE_BASELINE.but(moe=MOE_BASELINE.moe.but(n_experts=4, top_k=1)))


def record(variant, seed=0, mean=3.0, load=UNEVEN, **of_layers):
    """A run of two points, five steps each; the first layer is even, the second is as told."""
    curve = [
        {"step": 5, "bits_per_byte": 6.0 + seed, "load": [EVEN, EVEN]},
        {"step": 10, "bits_per_byte": mean, "load": [EVEN, load], "churn": [0.5, 0.25 + 0.1 * seed]},
    ]
    layer = {"max_violation": 1.0 + seed, "dead": 1, "information": 0.2, "information_shuffled": 0.05} | of_layers
    return {
        "variant": variant,
        "seed": seed,
        "model": TINY,
        "training": to_plain(BASELINE_TRAINING),
        "bits_per_byte": {"prose": mean},
        "mean": mean,
        "curve": curve,
        "layers": [{"max_violation": 0.0, "dead": 0, "information": 0.1, "information_shuffled": 0.01}, layer],
    }


@pytest.fixture
def results():
    names = ("no cure", "switch 0.01", "switch 1", "z-loss 0.1", "sigmoid bias 0.01, re-centred")
    runs = [record(name, seed, 3.0 + i / 10 + seed / 100) for seed in range(3) for i, name in enumerate(names)]
    chosen = record("expert choice", load=EVEN)
    for layer in chosen["layers"]:
        del layer["information"], layer["information_shuffled"]
    return Results("a question", {}, [*runs, chosen])


# --- load over a run ----------------------------------------------------------------------------------------------


def test_load_is_in_even_shares_between_the_steps_of_its_points():
    edges, load = load_over_steps(record("any"), 1)
    assert edges.tolist() == [0, 5, 10]
    assert load.tolist() == [[1, 2], [1, 1], [1, 1], [1, 0]]


def test_an_even_load_is_the_middle_of_the_scale_and_is_named(drawn):
    viz.draw_load(record("any"), 1, title="a title", alt="a load")
    axes, bar = drawn[0].axes
    mesh = axes.collections[0]
    doublings = mesh.get_array().reshape(4, 2)
    assert doublings.tolist() == [[0, 1], [0, 0], [0, 0], [0, -3]]  # nobody is as far down as the scale goes
    assert mesh.norm(0) == 0.5
    assert to_hex(mesh.cmap(0.5)) > "#f0f0f0"
    names = dict(zip(bar.get_yticks(), (label.get_text() for label in bar.get_yticklabels()), strict=True))
    assert names == {-3: "≤ 1/8", -2: "1/4", -1: "1/2", 0: "1 (even)", 1: "2", 2: "4", 3: "8"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step (a cell sums 5 of them)", "expert")
    assert bar.get_ylabel() == "load (in even shares)"


@pytest.mark.parametrize(
    ("n_experts", "top_k", "most"), [(16, 1, 4), (8, 2, 3), (30, 6, 3), (32, 1, 6), (4, 4, 3), (64, 1, 6)]
)
def test_the_scale_reaches_as_far_as_a_load_can(drawn, n_experts, top_k, most):
    run = record("any")
    run["model"] = TINY | {"moe": TINY["moe"] | {"n_experts": n_experts, "top_k": top_k}}
    load = [0] * n_experts
    load[:top_k] = [100] * top_k  # all tokens at the same experts
    for point in run["curve"]:
        point["load"] = [load, load]
    viz.draw_load(run, 0, title="a title", alt="a load")
    axes, bar = drawn[0].axes
    assert axes.collections[0].get_clim() == (-most, most)
    assert axes.collections[0].get_array().max() == pytest.approx(math.log2(n_experts / top_k))
    assert 0 in bar.get_yticks()
    assert len(axes.get_yticks()) <= 16


def test_a_layer_that_is_not_there_is_refused():
    dense = record("dense")
    for point in dense["curve"]:
        point["load"] = []
    with pytest.raises(ValueError, match="layer=2: expected 0 to 1"):
        viz.draw_load(record("any"), 2, title="a title", alt="a load")
    with pytest.raises(ValueError, match="The variant 'dense' has no layers of experts"):
        viz.draw_load(dense, 0, title="a title", alt="a load")


# --- seeds --------------------------------------------------------------------------------------------------------


def places(axes, marker):
    return {
        round(float(np.mean(dots.get_xdata()))): list(dots.get_ydata())
        for dots in axes.lines
        if dots.get_marker() == marker
    }


def test_every_seed_is_a_dot_and_the_mean_a_line(drawn, results):
    viz.bands(results, {"0": "no cure", "0.01": "switch 0.01"}, level=("dense", 3.2), **LABELS)
    (axes,) = drawn[0].axes
    assert places(axes, "o") == {0: pytest.approx([3.0, 3.01, 3.02]), 1: pytest.approx([3.1, 3.11, 3.12])}
    means = [found.get_ydata()[0] for found in axes.lines if found.get_marker() == "None"]
    assert means == pytest.approx([3.01, 3.11, 3.2])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.01"]
    assert [text.get_text() for text in axes.texts] == ["dense"]
    assert axes.get_ylim()[0] > 2.5  # differences of loss are small: not from zero
    assert len({x for dots in axes.lines if dots.get_marker() == "o" for x in dots.get_xdata()}) == 6


def test_a_single_seed_stands_in_its_place(drawn, results):
    viz.bands(results, {"chosen": "expert choice"}, **LABELS)
    assert places(drawn[0].axes[0], "o") == {0: [3.0]}


def test_measures_of_a_layer_start_at_zero_and_chance_is_grey(drawn, results):
    viz.bands(results, {"0": "no cure", "1": "switch 1"}, "information", layer=1, shuffled=True, **LABELS)
    (axes,) = drawn[0].axes
    assert places(axes, "o") == {0: [0.2] * 3, 1: [0.2] * 3}
    assert places(axes, "D") == {0: [0.05] * 3, 1: [0.05] * 3}
    colours = {dots.get_marker(): dots.get_color() for dots in axes.lines}
    assert (colours["o"], colours["D"]) == (SERIES[0], GREY)
    assert axes.get_ylim()[0] == 0
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"measured", "the same, shuffled"}


def test_what_was_not_recorded_is_named(results):
    with pytest.raises(ValueError, match="variant='none': expected one of no cure"):
        viz.bands(results, {"0": "none"}, **LABELS)
    with pytest.raises(ValueError, match="measure='information' was not recorded for the variant 'expert choice'"):
        viz.bands(results, {"0": "expert choice"}, "information", layer=0, **LABELS)


def test_long_labels_are_broken_at_commas_and_words(drawn, results):
    names = ("MoE, top-1", "7 experts, 1 shared", "a router that was frozen", *"abcd")
    viz.bands(results, dict.fromkeys(names, "no cure"), **LABELS)
    shown = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert shown[:3] == ["MoE, top-1", "7 experts,\n1 shared", "a router\nthat was\nfrozen"]


# --- curves of seeds ----------------------------------------------------------------------------------------------


def band(axes, i):
    return axes.collections[i].get_paths()[0].vertices


def test_a_band_reaches_from_the_least_to_the_largest_seed(drawn, results):
    viz.curve_band(results, {"none": "no cure", "strong": "switch 1"}, **LABELS)
    (axes,) = drawn[0].axes
    none, strong = axes.lines
    assert (none.get_label(), list(none.get_xdata())) == ("none", [5, 10])
    assert list(none.get_ydata()) == pytest.approx([7.0, 3.01])
    assert none.get_linestyle() != strong.get_linestyle()
    edges = band(axes, 0)
    assert {tuple(point) for point in edges.tolist()} >= {(5, 6.0), (5, 8.0), (10, 3.0)}
    assert axes.get_legend().get_title().get_text() == "band: 3 seeds"


def test_live_steps_are_averaged_over_the_recorded_stretches(drawn, results):
    steps = [Step(i, 0.01, (8 - i / 2) * math.log(2)) for i in range(12)]
    viz.curve_band(results, {"none": "no cure"}, live=steps, **LABELS)
    live = drawn[0].axes[0].lines[-1]
    assert list(live.get_xdata()) == [5, 10, 12]
    assert list(live.get_ydata()) == pytest.approx([7.0, 4.5, 2.75])
    assert live.get_color() == INK


def test_a_live_record_is_drawn_as_it_is(drawn, results):
    viz.curve_band(results, {"none": "no cure"}, live=record("no cure", 1, 3.3), **LABELS)
    assert list(drawn[0].axes[0].lines[-1].get_ydata()) == [7.0, 3.3]


def test_churn_is_of_a_layer_and_begins_with_the_second_point(drawn, results):
    viz.curve_band(results, {"none": "no cure"}, key="churn", layer=1, live=record("no cure"), **LABELS)
    mean, live = drawn[0].axes[0].lines
    assert list(mean.get_xdata()) == list(live.get_xdata()) == [10]
    assert list(mean.get_ydata()) == pytest.approx([0.35])
    assert list(live.get_ydata()) == [0.25]
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_what_was_early_can_be_left_out(drawn, results):
    viz.curve_band(results, {"none": "no cure"}, live=record("no cure"), since=6, **LABELS)
    assert [list(found.get_xdata()) for found in drawn[0].axes[0].lines] == [[10], [10]]


def test_curves_that_are_not_there_are_refused(results):
    with pytest.raises(ValueError, match="key='churn' with live steps: steps know only bits_per_byte"):
        viz.curve_band(results, {"none": "no cure"}, key="churn", layer=1, live=[Step(0, 0.01, 1.0)], **LABELS)
    with pytest.raises(ValueError, match="key='entropy' was not recorded for the variant 'no cure'"):
        viz.curve_band(results, {"none": "no cure"}, key="entropy", **LABELS)


# --- the explorer of cures ----------------------------------------------------------------------------------------


def test_variants_are_grouped_by_cure_with_no_cure_as_the_least_strength():
    names = ("no cure", "switch 0.0001", "switch 1", "z-loss 0.1", "sigmoid, no cure", "sigmoid bias 0.01")
    assert cures([*names, "sigmoid bias 0.01, re-centred", "expert choice", "a new one 3"]) == {
        "no cure": {"–": "no cure"},
        "Switch loss": {"0": "no cure", "0.0001": "switch 0.0001", "1": "switch 1"},
        "z-loss": {"0": "no cure", "0.1": "z-loss 0.1"},
        "sigmoid, no cure": {"–": "sigmoid, no cure"},
        "bias, sigmoid scores": {
            "0": "sigmoid, no cure",
            "0.01": "sigmoid bias 0.01",
            "0.01, re-centred": "sigmoid bias 0.01, re-centred",
        },
        "expert choice": {"–": "expert choice"},
        "a new one": {"3": "a new one 3"},
    }


def test_every_variant_of_the_script_can_be_chosen():
    from importlib.util import module_from_spec, spec_from_file_location

    from moe_lab.paths import course_root

    spec = spec_from_file_location("balance_script", course_root() / "benchmarks" / "experiments" / "balance.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    names = [variant.name for variant in script.variants(MOE_BASELINE, BASELINE_TRAINING)]
    found = cures(names)
    assert {variant for strengths in found.values() for variant in strengths.values()} == set(names)
    assert list(found["Switch loss"]) == ["0", *(f"{alpha:g}" for alpha in script.ALPHAS)]
    assert len(found) == 10


def test_a_run_s_end_is_told_with_the_range_of_its_seeds(results):
    facts = {fact.name: (fact.value, fact.spread) for fact in end_of(results.of("switch 1"), 1)}
    assert facts == {
        "MaxVio, last 5 steps summed": ("1.00", "1.00 to 1.00"),
        "MaxVio, held-out text": ("1.00", "1.00 to 3.00"),
        "dead experts, held-out text": ("1 of 4", "1 to 1"),
        "bits per byte, held-out text": ("3.200", "3.200 to 3.220"),
        "I(domain; expert | byte)": ("0.200 bits", "0.200 to 0.200"),
    }
    assert "I(domain; expert | byte)" not in {fact.name for fact in end_of(results.of("expert choice"), 1)}


def test_choosing_redraws_once_and_keeps_the_strength_where_it_can(drawn, results):
    explorer = viz.CureExplorer(results)
    sliders = explorer.sliders

    def choose(name, value):
        n_drawn = len(drawn)
        sliders[name].value = value
        assert len(drawn) == n_drawn + 1
        assert explorer.image.value == explorer.picture.png
        assert html.escape(explorer.picture.alt) in explorer.caption.value
        return drawn[-1].axes[0].get_title(loc="left")

    assert drawn[-1].axes[0].get_title(loc="left") == "no cure; MoE layer 2"
    assert choose("cure", "Switch loss") == "Switch loss, α 0; MoE layer 2"
    assert list(sliders["strength"].options) == [("0", "no cure"), ("0.01", "switch 0.01"), ("1", "switch 1")]
    assert choose("strength", "switch 0.01") == "Switch loss, α 0.01; MoE layer 2"
    assert choose("layer", 1) == "Switch loss, α 0.01; MoE layer 1"
    assert "MaxVio, held-out text 0.00" in explorer.picture.alt
    assert choose("cure", "z-loss") == "z-loss, coefficient 0; MoE layer 1"  # it has no 0.01
    assert choose("strength", "z-loss 0.1") == "z-loss, coefficient 0.1; MoE layer 1"
    assert choose("cure", "expert choice") == "expert choice; MoE layer 1"
    choose("cure", "Switch loss")
    choose("strength", "switch 1")
    assert choose("cure", "no cure") == "no cure; MoE layer 1"


def test_a_strength_that_both_cures_have_is_kept(results):
    runs = [*results.runs, record("sequence 1")]
    explorer = viz.CureExplorer(Results("a question", {}, runs))
    explorer.sliders["cure"].value = "Switch loss"
    explorer.sliders["strength"].value = "switch 1"
    explorer.sliders["cure"].value = "sequence-wise loss"
    assert explorer.sliders["strength"].value == "sequence 1"


def test_what_was_not_measured_and_how_a_cure_was_changed_are_told(drawn, results):
    explorer = viz.CureExplorer(results)
    told = explorer.draw(cure="expert choice", strength="expert choice", layer=2).alt
    assert "I(domain" not in told
    assert told.endswith("bits per byte, held-out text 3.000.")
    told = explorer.draw(cure="bias, sigmoid scores", strength="sigmoid bias 0.01, re-centred", layer=2).alt
    assert "bias, sigmoid scores, γ 0.01, re-centred, MoE layer 2" in told
    texts = [text.get_text() for text in drawn[-1].texts]
    assert texts[:4] == ["Seed 0 at its end (all 3 seeds)", "MaxVio, last 5 steps summed", "1.00", "(1.00 to 1.00)"]


def test_the_explorer_leaves_a_picture_for_readers_without_a_kernel(results):
    bundle, metadata = viz.CureExplorer(results)._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"].startswith("Figure: Load per expert over the steps, no cure, MoE layer 2.")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert metadata["image/png"]["alt"]
