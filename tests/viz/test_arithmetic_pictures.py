"""The drawings of what models hold, read and compute show the counts, and the calculator says what its sliders say."""

import base64
import math

import pytest

from moe_lab import viz
from moe_lab.accounting import (
    cache_bytes,
    count_parameters,
    decode_reads,
    distinct_experts,
    expert_parameters,
    weight_bytes,
)
from moe_lab.config import LMConfig, MoEConfig
from moe_lab.presets import DEEPSEEK_V3, LLAMA_7B, PRESETS
from moe_lab.roofline import GPUS, decode, prefill
from moe_lab.viz import arithmetic, picture
from moe_lab.viz.arithmetic import ArithmeticExplorer

SMALL = LMConfig(
    d_model=256, n_layers=3, n_heads=4, d_ff=512, moe=MoEConfig(d_model=256, d_ff=128, n_experts=16, top_k=3)
)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def points(axes) -> set[tuple[float, float]]:
    """What stands in the axes as markers, not as lines."""
    return {xy for line in axes.lines if line.get_linestyle() == "None" for xy in zip(*line.get_data(), strict=True)}


# --- what models hold -----------------------------------------------------------------------------------------------


def test_every_preset_is_a_point(drawn):
    shown = viz.draw_active_against_total()
    axes = drawn[0].axes[0]
    expected = {
        tuple(count_parameters(preset.config, active).total for active in (False, True)) for preset in PRESETS.values()
    }
    assert {(int(x), int(y)) for x, y in points(axes)} == expected
    assert f"{len(expected)} points of {len(PRESETS)} models" in shown.alt
    assert "DeepSeek-V3, R1" in texts(axes)
    assert "DeepSeek-V3, DeepSeek-R1 37.6 B of 671 B, 5.6 %" in shown.alt
    assert "smallest share, 0.111 %, is that of Switch-C-2048" in shown.alt


def test_lines_of_equal_share(drawn):
    viz.draw_active_against_total(shares=(1, 0.25))
    axes = drawn[0].axes[0]
    lines = [line for line in axes.lines if line.get_linestyle() == "--"]
    for line, share in zip(lines, (1, 0.25), strict=True):
        assert line.get_ydata() == pytest.approx([share * x for x in line.get_xdata()])
    assert {"all active", "25 % active"} <= set(texts(axes))
    dense = [(x, y) for x, y in points(axes) if x == y]
    assert len(dense) == sum(map(_is_dense, PRESETS.values()))


def _is_dense(preset) -> bool:
    return count_parameters(preset.config).total == count_parameters(preset.config, active=True).total


@pytest.mark.parametrize("names", [None, ["DeepSeek-V3", "Kimi-K2", "Llama 3 70B", "Qwen2.5-72B", "DeepSeek-67B"]])
def test_no_label_lies_on_another_or_on_a_point(drawn, names):
    viz.draw_active_against_total(names)
    figure = drawn[0]
    figure.draw_without_rendering()  # at the figure's own resolution, not that of the PNG
    axes = figure.axes[0]
    labels = [label for label in axes.texts if "active" not in label.get_text()]
    assert len(labels) == len(arithmetic.sizes(names))
    boxes = {label.get_text(): arithmetic.label_box(label) for label in labels}
    for name, box in boxes.items():
        assert not [other for other in boxes if other != name and box.overlaps(boxes[other])]
        assert not [xy for xy in points(axes) if box.contains(*axes.transData.transform(xy))]


def test_bars_are_the_shares_of_all_parameters(drawn):
    names = ["Llama 3 70B", "DeepSeek-V3"]
    shown = viz.draw_where_parameters_sit(names)
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "all active 70.6 B",
        "total 671 B",
        "active 37.6 B",
    ]
    rows = {}
    for bar in axes.patches:
        rows.setdefault(bar.get_y(), []).append(bar.get_width())
    counts = [
        count_parameters(PRESETS["Llama 3 70B"].config),
        *(count_parameters(DEEPSEEK_V3, active) for active in (False, True)),
    ]
    for widths, parameters in zip(rows.values(), counts, strict=True):
        assert sum(widths) == pytest.approx(100)
        assert widths == pytest.approx([share for share in arithmetic.part_shares(parameters).values() if share])
    assert arithmetic.part_shares(counts[2])["routed experts"] == pytest.approx(100 * counts[2].share("experts"))
    assert "DeepSeek-V3, active 37.6 B: embedding and head 4.9 %" in shown.alt


def test_no_part_is_left_out_or_counted_twice():
    parts = [part for parts, _ in arithmetic.GROUPS.values() for part in parts]
    assert sorted(parts) == sorted(count_parameters(LLAMA_7B).by_part())


# --- what decoding reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["DeepSeek-V3", "Qwen3-30B-A3B", "gpt-oss-120b", "Kimi-K2", "Llama 4 Scout"])
def test_the_dense_twin_is_as_large_as_the_active_part(model):
    config = PRESETS[model].config
    twin = arithmetic.dense_twin(config)
    assert twin.moe is None
    assert (twin.d_model, twin.n_layers, twin.vocab_size) == (config.d_model, config.n_layers, config.vocab_size)
    active = count_parameters(config, active=True).without_embedding
    step = 3 * twin.d_model * 128 * twin.n_layers  # the nearest width: at most half a step off
    assert abs(count_parameters(twin).without_embedding - active) <= 0.6 * step
    assert twin.d_ff % 128 == 0


def test_the_batch_that_touches_nearly_all():
    moe = DEEPSEEK_V3.moe
    assert arithmetic.batch_that_touches(moe) == math.ceil(math.log(0.01) / math.log(1 - 8 / 256)) == 146
    assert arithmetic.batch_that_touches(MoEConfig(d_model=8, d_ff=8, n_experts=4, top_k=4)) == 1


def test_curves_are_what_a_step_reads(drawn):
    shown = viz.draw_decode_reads()
    step, token = drawn[0].axes
    for axes, is_per_token in ((step, False), (token, True)):
        sparse, dense = (line for line in axes.lines if line.get_label() in ("DeepSeek-V3", "dense, 37B"))
        twin = arithmetic.dense_twin(DEEPSEEK_V3)
        for line, config in ((sparse, DEEPSEEK_V3), (dense, twin)):
            expected = [decode_reads(config, b) / 1e9 / (b if is_per_token else 1) for b in line.get_xdata()]
            assert line.get_ydata() == pytest.approx(expected)
        assert {1, 32, 146, 4096} <= set(sparse.get_xdata())
    by_hand = count_parameters(DEEPSEEK_V3, active=True).without_embedding - 58 * 8 * expert_parameters(DEEPSEEK_V3.moe)
    by_hand += 58 * distinct_experts(256, 8, 32) * expert_parameters(DEEPSEEK_V3.moe)
    assert f"at 32 {by_hand / 1e9:.0f}, 11.8 times as much" in shown.alt
    assert "A batch of 146 touches 99 %" in shown.alt


def test_reads_in_another_format_and_of_a_users_own_model(drawn):
    viz.draw_decode_reads(SMALL, number="bf16", mark=5)
    sparse = next(line for line in drawn[0].axes[0].lines if line.get_label() == "this model")
    at = dict(zip(*sparse.get_data(), strict=True))
    assert at[5] == pytest.approx(2 * decode_reads(SMALL, 5) / 1e9)


def test_points_of_a_blind_choice_lie_on_the_curve(drawn):
    shown = viz.draw_experts_touched()
    for n_experts, top_k in ((8, 2), (64, 8), (128, 1), (384, 8)):
        for batch in (1, 4, 16, 64):
            formula = distinct_experts(n_experts, top_k, batch) / n_experts
            assert arithmetic.simulated_touched(n_experts, top_k, batch) / n_experts == pytest.approx(formula, abs=0.03)
    assert arithmetic.simulated_touched(64, 8, 4) == arithmetic.simulated_touched(64, 8, 4)
    curve = next(line for line in drawn[0].axes[0].lines if len(line.get_xdata()) > 10)  # Mixtral's, the first
    expected = [100 * distinct_experts(8, 2, batch) / 8 for batch in curve.get_xdata()]
    assert curve.get_ydata() == pytest.approx(expected)
    assert "DeepSeek-V3, 8 of 256, 64 % at 32, 99 % at 146" in shown.alt


@pytest.mark.parametrize(
    "draw", [viz.draw_decode_reads, viz.draw_rooflines, lambda name: viz.draw_experts_touched([name])]
)
def test_models_that_cannot_be_drawn_say_so(draw):
    with pytest.raises(ValueError, match="expected a model with experts"):
        draw("Llama 3 70B")
    with pytest.raises(ValueError, match="not an encoder-decoder"):
        draw("Switch-C-2048")
    with pytest.raises(ValueError, match="GPT-4 is undisclosed"):
        draw("GPT-4")


# --- rooflines ------------------------------------------------------------------------------------------------------


def test_points_stand_on_the_roof_where_their_work_puts_them(drawn):
    shown = viz.draw_rooflines(gpu="H100", number="fp8", context=1000, prompts=(100, 3000), batches=(2, 50))
    machine, twin = GPUS["H100"], arithmetic.dense_twin(DEEPSEEK_V3)
    works = [prefill(DEEPSEEK_V3, n, number="fp8") for n in (100, 3000)]
    works += [decode(config, n, 1000, "fp8") for config in (DEEPSEEK_V3, twin) for n in (2, 50)]
    expected = sorted((work.intensity, work.reached(machine, "fp8") / 1e12) for work in works)
    roof, below = drawn[0].axes
    found = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in roof.lines if len(line.get_xdata()) == 1)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected])
    assert [y for _, y in found] == pytest.approx([y for _, y in expected])
    assert {"100", "3,000", "2", "50"} <= set(texts(below))
    assert "Nothing here was measured" in shown.alt
    assert "dense, 37B, decode" in shown.alt
    assert max(roof.lines[0].get_ydata()) == pytest.approx(machine.rate("fp8") / 1e12)


def test_places_too_near_to_each_other_share_a_label(drawn):
    viz.draw_rooflines(prompts=(4000, 4001, 4002), batches=(1,))
    assert "4,000, 4,001, 4,002" in texts(drawn[0].axes[1])


def test_an_unknown_gpu_or_format_says_what_is_known():
    with pytest.raises(ValueError, match="gpu='H3000': expected one of RTX 4090"):
        viz.draw_rooflines(gpu="H3000")
    with pytest.raises(ValueError, match="the A100 multiplies bf16"):
        viz.draw_rooflines(gpu="A100", number="fp8")


# --- caches ---------------------------------------------------------------------------------------------------------


def test_one_head_keeps_less_than_latent_attention(drawn):
    shown = viz.draw_caches(1000)
    axes = drawn[0].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    # 61 layers, 2 bytes: 512 + 64 numbers; keys and values of 8, 4 and one head of 128; the bar of all 128 is cut
    of_v3 = [61 * 2 * numbers / 1e3 for numbers in (576, 2 * 8 * 128, 2 * 4 * 128, 2 * 128)]
    of_others = [2 * 2 * 8 * 128 * layers / 1e3 for layers in (126, 80, 80)]
    assert widths[:4] == pytest.approx(of_v3)
    assert widths[5:] == pytest.approx(of_others)
    assert max(of_others) < widths[4] < 61 * 2 * 2 * 128 * 128 / 1e3
    assert widths[3] < widths[0]
    assert "3,998 KB, 4 GB" in texts(axes)
    assert "The shortest bar is: the same with MQA. The bar of the same with MHA is cut." in shown.alt


def test_a_window_keeps_no_more_than_it_sees(drawn):
    viz.draw_caches(100_000, others=["Mistral-7B"])
    assert drawn[0].axes[0].patches[-1].get_width() == pytest.approx(
        cache_bytes(PRESETS["Mistral-7B"].config, 4096) / 100_000 / 1e3
    )


def test_caches_start_from_latent_attention():
    with pytest.raises(ValueError, match="expected a model with latent attention"):
        viz.draw_caches(model="Mixtral 8x7B")


# --- the calculator -------------------------------------------------------------------------------------------------


@pytest.fixture
def unrendered(monkeypatch):
    """Pictures with their alt text alone, for saying is quick and rendering is not."""

    def init(self, figure, alt):
        self.alt, self.png = alt, b"\0" * 16 + (1800).to_bytes(4, "big") + alt.encode()

    monkeypatch.setattr(picture.Picture, "__init__", init)


def test_a_preset_sets_all_and_counts_as_itself(unrendered):
    explorer = viz.explore_arithmetic(ArithmeticExplorer.MODELS[-1])
    for preset in ArithmeticExplorer.MODELS:
        explorer.sliders["preset"].value = preset
        shown = {name: explorer.sliders[name].value for name in ArithmeticExplorer.sizes_of(preset)}
        assert shown == ArithmeticExplorer.sizes_of(preset)  # no slider has clipped or rounded a size
        config = PRESETS[preset].config
        for active in (False, True):
            counted = count_parameters(ArithmeticExplorer.config(preset, **shown), active)
            assert counted == count_parameters(config, active)
        assert explorer.picture.alt.startswith(f"{preset}: ")
        assert f"In fp8 the weights take {arithmetic._gigabytes(weight_bytes(config, 'fp8'))};" in explorer.picture.alt


def test_a_preset_is_drawn_once(drawn):
    explorer = viz.explore_arithmetic("Mixtral 8x7B")
    explorer.sliders["preset"].value = "Kimi-K2"
    assert len(drawn) == 2


# DeepSeek-V3: an expert has 3 * 7168 * 2048 = 44.04 M numbers, a layer 256 + 1 of them, 58 layers have experts
@pytest.mark.parametrize(
    ("slider", "value", "said"),
    [
        ("n_experts", 128, "344 B parameters, 37.5 B active"),
        ("top_k", 16, "58 B active"),
        ("n_shared_experts", 2, "674 B parameters"),
        ("d_ff", 1024, "343 B parameters, 26.1 B active"),
        ("d_model", 3584, "DeepSeek-V3 with other sizes"),
        ("n_layers", 30, "DeepSeek-V3 with other sizes"),
        ("batch", 1, "3.12 % of the experts"),
        ("context", 131_072, "takes 295 GB in bf16, 9.21 GB each"),
        ("number", "bf16", "the weights take 1,342 GB"),
    ],
)
def test_every_slider_changes_what_is_said(unrendered, slider, value, said):
    explorer = viz.explore_arithmetic()
    before = explorer.picture.alt
    explorer.sliders[slider].value = value
    assert explorer.picture.alt != before
    assert said in explorer.picture.alt
    assert explorer.image.value == explorer.picture.png
    assert said in explorer.caption.value


def test_what_is_said_of_deepseek_v3(drawn):
    alt = viz.explore_arithmetic().picture.alt
    cache, read = 32 * cache_bytes(DEEPSEEK_V3, 4096), decode_reads(DEEPSEEK_V3, 32)
    assert "671 B parameters, 37.6 B active" in alt
    assert f"reads {read / 1e9:.0f} GB of weights, 63.8 % of the experts" in alt
    assert f"{(read + cache) / 32 / 1e9:.3g} GB a token" in alt
    total = count_parameters(DEEPSEEK_V3).total
    held = arithmetic.gpus_that_hold(total, cache)
    assert held["H200"] == (math.ceil(total / 141e9), math.ceil((total + cache) / 141e9)) == (5, 5)
    assert held["RTX 4090"] == (28, 29)
    assert "29 RTX 4090, 9 A100, 9 H100, 5 H200" in alt
    _, gpus, held_and_read = drawn[0].axes
    assert sum(bar.get_width() for bar in gpus.patches) == sum(both for _, both in held.values())
    assert [bar.get_width() for bar in held_and_read.patches] == pytest.approx(
        [size / 1e9 for size in (total, cache, read, cache)]
    )


@pytest.mark.parametrize(
    ("preset", "changes", "sentence"),
    [
        ("Mixtral 8x7B", {"top_k": 9}, "These sizes make no model: top_k=9: expected at most n_experts=8."),
        ("DeepSeek-V3", {"n_experts": 4}, "These sizes make no model: top_k=8: expected at most n_experts=4."),
        ("gpt-oss-20b", {"n_shared_experts": 1}, "n_shared_experts=1: expected 0"),
    ],
)
def test_an_impossible_combination_is_a_sentence(unrendered, preset, changes, sentence):
    explorer = viz.explore_arithmetic(preset)
    for name, value in changes.items():
        explorer.sliders[name].value = value
    assert sentence in explorer.picture.alt
    assert explorer.image.value == explorer.picture.png
    explorer.sliders["preset"].value = "OLMoE-1B-7B"  # and the way back is open
    assert explorer.picture.alt.startswith("OLMoE-1B-7B: ")


LEAST = {"top_k": 1, "n_shared_experts": 0, "d_ff": 64, "d_model": 512, "n_layers": 1}
MOST = {"n_experts": 512, "top_k": 32, "n_shared_experts": 8, "d_ff": 65_536, "d_model": 16_384, "n_layers": 128}


@pytest.mark.parametrize("preset", ["DeepSeek-V3", "Llama 3.1 405B", "Llama 4 Maverick"])
def test_the_calculator_has_an_answer_at_its_corners(unrendered, preset):
    explorer = viz.explore_arithmetic(preset)
    for sizes in ({"n_experts": 0} | LEAST, {"n_experts": 1} | LEAST, MOST):
        for context, batch in ((512, 1), (2**20, 4096)):
            shown = explorer.draw(preset=preset, number="fp32", batch=batch, context=context, **sizes)
            assert " active. In fp32 the weights take " in shown.alt


def test_the_calculator_draws_at_its_corners():
    explorer = viz.explore_arithmetic()
    for context, batch, sizes in ((512, 1, {"n_experts": 0} | LEAST), (2**20, 4096, MOST)):
        assert explorer.draw(preset="DeepSeek-V3", number="fp32", batch=batch, context=context, **sizes).png


def test_the_calculator_leaves_a_picture_for_readers_without_a_kernel():
    bundle, metadata = viz.explore_arithmetic()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].startswith("Figure: DeepSeek-V3: 671 B parameters")
    assert metadata["image/png"]["alt"]


@pytest.mark.parametrize("draw", [viz.draw_active_against_total, viz.draw_experts_touched])
def test_drawings_are_the_same_bytes_every_time(draw):
    assert draw().png == draw().png
