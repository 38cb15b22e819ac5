"""The drawings of the cost model show what the model says: areas, bars and their order are read off the figures."""

from dataclasses import replace

import pytest

from moe_lab import viz
from moe_lab.parallel.cost import DEEPSEEK_V3, H100_ROCE, H800_INFINIBAND, Layout, layer_time, model_of, step_time
from moe_lab.presets import REAL_MOE_MODELS
from moe_lab.viz import scaling

MODEL = model_of("Qwen3-30B-A3B", REAL_MOE_MODELS["Qwen3-30B-A3B"])


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def borders(axes) -> list[dict[float, float]]:
    """The upper border of each area, by ranks."""
    areas = [area.get_paths()[0].vertices for area in axes.collections]
    return [{x: max(v for u, v in area if u == x) for x, _ in area} for area in areas]


def test_areas_are_the_shares_of_the_steps(drawn):
    ranks = [128, 512, 2048]
    shown = viz.draw_scaling(ranks=ranks)
    (figure,) = drawn
    assert len(figure.axes) == 6
    free = replace(DEEPSEEK_V3, moe=DEEPSEEK_V3.moe.but(n_groups=1, groups_kept=1, group_score="max"))
    for axes, tokens_of in ((figure.axes[0], lambda n: 30_720 * n), (figure.axes[3], lambda n: 15_360 * 4096)):
        computing, dispatch, combine, rest = borders(axes)
        for n in ranks:
            step = step_time(H800_INFINIBAND, free, Layout(n_ranks=n, pp=16, ep=n // 16), tokens_of(n))
            assert computing[n] == pytest.approx(100 * step.share("compute"))
            assert dispatch[n] - computing[n] == pytest.approx(100 * step.share("dispatch"))
            assert combine[n] - dispatch[n] == pytest.approx(100 * step.share("combine"))
            assert rest[n] == pytest.approx(100)
    assert "from 128 to 2,048 GPUs" in shown.alt
    assert "experts over 8 to 128 ranks" in figure.get_suptitle()


def test_every_way_of_travelling_saves_time(drawn):
    viz.draw_scaling()
    (figure,) = drawn
    for row in (figure.axes[:3], figure.axes[3:]):
        computing = [borders(axes)[0][2048] for axes in row]
        assert computing == sorted(computing)


def test_what_is_hidden_is_not_drawn(drawn):
    viz.draw_scaling(ranks=[128, 1024], overlap=True)
    computing, dispatch, combine, _ = borders(drawn[0].axes[0])
    assert computing == dispatch == combine


def test_bars_are_the_bytes_of_each_way(drawn):
    shown = viz.draw_ways(MODEL, tokens_per_rank=4096)
    (axes,) = drawn[0].axes
    sent = scaling.sent_by_way(H800_INFINIBAND, MODEL, 8, 4096)
    expected = [sent["dp"].dp, sent["tp"].tp, sent["ep"].dp, sent["ep"].ep, sent["pp"].pp]
    assert widths(axes) == pytest.approx([n / 1e9 for n in expected])
    assert texts(axes) == [f"{way.total / 1e9:.3g}" for way in sent.values()]
    assert all(text in shown.alt for text in texts(axes))


def test_bars_are_the_bytes_that_cross_nodes(drawn):
    viz.draw_savings()
    axes = drawn[0].axes[0]
    # DeepSeek-V3, 64 ranks: of 8 copies 7 leave the node, 6.716 of 7.676, 4.633 of 5.295, 3.5 of 4; fp8 has scales
    rows = [7, 6.716281, 4.632821, 3.5]
    expected = [(n * 14.336, n * 14.336) for n in rows] + [(3.5 * 7.392, 3.5 * 14.336)]
    assert widths(axes) == pytest.approx([width for pair in expected for width in pair], rel=1e-6)
    # the line stands where the bytes would take as long as the layer computes, 4,096 tokens at 50 GB/s
    layer = layer_time(H800_INFINIBAND, DEEPSEEK_V3.moe, 64, 4096, other_flops=DEEPSEEK_V3.other_flops / 58)
    (line,) = axes.lines
    assert line.get_xdata()[0] * 1e3 * 4096 / 50e9 == pytest.approx(layer.compute)
    assert f"computing:\n{layer.compute * 1e3:.1f} ms" in texts(axes)


@pytest.mark.parametrize(
    "draw", [lambda: viz.draw_savings(H100_ROCE, MODEL, n_ranks=16), lambda: viz.draw_ways(MODEL, H100_ROCE, n_ranks=4)]
)
def test_drawings_take_other_models_and_are_the_same_bytes_every_time(draw):
    assert draw().png == draw().png
