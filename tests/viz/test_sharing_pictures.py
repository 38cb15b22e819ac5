"""What the pictures of cut and shared experts show: their data, their alt text, and the explorer at its corners."""

import base64
from itertools import pairwise

import pytest

from moe_lab import viz
from moe_lab.accounting import cut_finer, moe_parameters, router_parameters
from moe_lab.viz.sharing import CHOSEN, CutExplorer, pieces, spread

WHOLE = CutExplorer.WHOLE
LAYERS = {
    "whole": WHOLE,
    "cut": WHOLE.but(**cut_finer(WHOLE, 4)),
    "some shared": WHOLE.but(**cut_finer(WHOLE, 4, 2)),
    "wide shared": WHOLE.but(n_experts=5, top_k=1, n_shared_experts=1, d_ff_shared=192),
}


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (7, 1), (8, 2), (30, 6), (64, 16), (5, 5)])
def test_a_choice_has_k_different_experts(n_experts, top_k):
    chosen = spread(n_experts, top_k)
    assert len(set(chosen)) == top_k
    assert set(chosen) <= set(range(n_experts))


@pytest.mark.parametrize("moe", LAYERS.values(), ids=LAYERS)
def test_pieces_fill_the_strip_in_proportion(moe):
    found = pieces(moe)
    assert [kind for _, _, kind in found].count("shared") == moe.n_shared_experts
    assert [kind for _, _, kind in found].count("chosen") == moe.top_k
    assert len(found) == moe.n_experts + moe.n_shared_experts
    assert sum(width for _, width, _ in found) == pytest.approx(1)
    for (left, width, _), (following, _, _) in pairwise(found):
        assert following == pytest.approx(left + width)
    hidden = moe.n_experts * moe.d_ff + moe.d_ff_shared
    used = sum(width for _, width, kind in found if kind != "passed over")
    assert used == pytest.approx((moe.top_k * moe.d_ff + moe.d_ff_shared) / hidden)


def test_equally_cut_layers_use_equally_much():
    shares = [
        sum(width for _, width, kind in pieces(LAYERS[name]) if kind != "passed over") for name in list(LAYERS)[:3]
    ]
    assert shares == pytest.approx([0.25] * 3)


def test_layers_are_drawn_with_what_a_token_uses(drawn):
    shown = viz.draw_cut(WHOLE, {"whole": (1, 0), "cut": (4, 0), "some shared": (4, 2)})
    texts = {text.get_text() for text in drawn[0].axes[0].texts}
    assert {"whole: 2 of 8", "cut: 8 of 32", "some shared: 6 of 30, and 2 shared"} <= texts
    assert "shared: every token uses it" in texts
    assert "cut: 8 of 32; some shared: 6 of 30, and 2 shared" in shown.alt
    swatches = 3
    assert len(drawn[0].axes[0].patches) == 8 + 32 + 32 + swatches


def test_the_picture_gives_no_prediction_away(drawn):
    shown = viz.draw_cut(WHOLE, {"cut": (4, 0)})
    assert "combinations" not in " ".join([shown.alt, *(text.get_text() for text in drawn[0].axes[0].texts)])


def test_no_shared_expert_is_explained_where_there_is_none(drawn):
    viz.draw_cut(WHOLE, {"whole": (1, 0)})
    assert not any("every token" in text.get_text() for text in drawn[0].axes[0].texts)
    chosen = [patch for patch in drawn[0].axes[0].patches if patch.get_linewidth() == CHOSEN["linewidth"]]
    assert len(chosen) == WHOLE.top_k + 1  # and the swatch


def test_the_path_has_a_gate_only_if_gated(drawn):
    plain, gated = viz.draw_shared_path(), viz.draw_shared_path(gated=True)
    told = [{text.get_text() for text in figure.axes[0].texts} for figure in drawn]
    assert told[1] - told[0] == {"gate", "sigmoid: one number, 0 to 1"}
    assert told[0] - told[1] == {"no weight: it always counts in full"}
    assert "gate" in gated.alt
    assert "without any weight" in plain.alt


def test_the_explorer_says_what_stays_and_what_grows():
    explorer = CutExplorer()
    assert "6 of 30, and 2 shared, each 16 wide, 593,775 combinations" in explorer.picture.alt
    assert "parameters in the router 512 and 1,920" in explorer.picture.alt
    explorer.sliders["n_shared"].value = 0
    explorer.sliders["m"].value = 1
    assert "the same cut: 2 of 8, each 64 wide, 28 combinations" in explorer.picture.alt


@pytest.mark.parametrize("m", CutExplorer.CUTS)
@pytest.mark.parametrize("n_shared", [0, 1, 31])
def test_the_explorer_keeps_parameters_at_its_corners(m, n_shared):
    cut = CutExplorer.layer(m, n_shared)
    for active in (False, True):
        sizes = [moe_parameters(moe, active=active) - router_parameters(moe) for moe in (WHOLE, cut)]
        assert sizes[0] == sizes[1]
    assert cut.top_k >= 1
    assert CutExplorer().draw(m=m, n_shared=n_shared).png


def test_the_explorer_leaves_a_picture_for_readers_without_a_kernel():
    bundle, metadata = CutExplorer()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"]
