"""What the figures of notebook 08 show, as numbers."""

import json
from types import SimpleNamespace

import pytest
import torch

from moe_lab import viz
from moe_lab.gpu import floors
from moe_lab.viz import kernels

MEASURED = {
    "measured": True,
    "date": "2026-01-02",
    "machine": {"gpu": "a GPU of this test", "torch": "2.0", "triton": "3.0"},
    "sweep": [
        {
            "tokens_per_expert": tokens,
            "ours": "with TMA",
            "product": {
                "with TMA": {"tflops": 2.0 * tokens},
                "dense": {"tflops": 3.0 * tokens},
                "torch": {"failed": "x"},
            },
        }
        for tokens in (4, 8)
    ],
    "steps": [{"candidates": {"small": {"flops_per_byte": 10.0, "tflops": 50.0}, "no": {"failed": "no"}}}],
}


def test_nothing_is_recorded_until_a_gpu_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "results_dir", lambda: tmp_path)
    assert kernels.recorded() is None
    (tmp_path / "gpu.json").write_text(json.dumps(MEASURED | {"measured": False}), encoding="utf-8")
    assert kernels.recorded() is None
    (tmp_path / "gpu.json").write_text(json.dumps(MEASURED), encoding="utf-8")
    assert kernels.recorded() == MEASURED


def test_what_a_byte_costs_in_operations():
    operations = {name: of for name, _, _, of in kernels.memories()}
    assert operations["shared memory and L1"] == 32
    assert operations["memory (HBM)"] == pytest.approx(206, abs=1)
    assert "206" in viz.draw_memory().alt


def test_the_roof():
    corner = floors.H200.operations / floors.H200.bytes
    assert kernels.roof(1) == pytest.approx(4.8)
    assert kernels.roof(corner) == kernels.roof(10 * corner) == 989
    alt = viz.draw_roofline({"a": 10.0, "b": (20.0, 33.0)}).alt
    assert "a at 10, not measured, the roof there is 48 TFLOP/s" in alt
    assert "b at 20, 33 TFLOP/s" in alt


@pytest.mark.parametrize(
    ("counts", "block", "padded", "tiled"),
    [([2, 0, 4], 2, 1 / 2, 0), ([1, 1, 1], 4, 0, 3 / 4), ([13, 2, 0, 30, 7, 4, 20, 1], 4, 1 - 77 / 240, 1 - 77 / 88)],
)
def test_waste(counts, block, padded, tiled):
    assert kernels.waste(counts, block) == pytest.approx((padded, tiled))
    assert f"{padded:.0%} of the rows are computed for nothing" in viz.draw_padding(counts, block).alt


def test_tiles_over_the_sorted_rows():
    alt = viz.draw_tiles([5, 0, 6, 1, 3], 4).alt
    assert "15 rows sorted by expert, 5, 0, 6, 1, 3 rows each" in alt
    assert "7 tiles of up to 4 rows: 6 are used" in alt
    assert "of experts 0, 0, 2, 2, 3, 4 with 4, 1, 4, 2, 1, 3 rows" in alt
    for draw in (viz.draw_tiles, viz.draw_padding):
        with pytest.raises(ValueError, match="expected at least one row"):
            draw([0, 0], 4)


@pytest.mark.parametrize(("n_rows", "n_columns", "band"), [(4, 3, 1), (5, 3, 2), (7, 2, 4), (3, 4, 8)])
def test_every_tile_has_a_program_and_bands_go_down_first(n_rows, n_columns, band):
    order = kernels.program_of_tiles(n_rows, n_columns, band)
    assert sorted(program for row in order for program in row) == list(range(n_rows * n_columns))
    height = min(band, n_rows)
    assert [order[row][0] for row in range(height)] == list(range(height))
    if band == 1:
        assert order[0] == list(range(n_columns))


def test_what_programs_read_at_once():
    alt = viz.draw_tile_order(12, 12, 4).alt
    assert "row by row: 2 tiles of rows and 12 of columns; in bands of 4: 4 tiles of rows and 4 of columns" in alt


def test_the_limit_of_the_sweep_and_what_was_measured():
    assert kernels.sweep_limit(4096) == kernels.RATE == 989
    assert kernels.sweep_limit(4) < 20
    assert kernels.NOT_RECORDED in viz.draw_throughput(None).alt
    alt = viz.draw_throughput(MEASURED).alt
    assert "ours, with TMA reaches 16 TFLOP/s; dense reaches 24 TFLOP/s." in alt
    assert kernels.NOT_RECORDED not in alt


def test_the_steps_of_the_optimisation():
    assert kernels.stages_of(MEASURED) == {"small": (1e5, 50.0)}
    alt = viz.draw_stages(MEASURED).alt
    assert "a GPU of this test, torch 2.0, triton 3.0, 2026-01-02: small 50 TFLOP/s." in alt
    asked = [asked for asked, rate in kernels.stages_of(None).values() if rate is None]
    assert len(asked) == 4
    assert asked == sorted(asked, reverse=True)
    # a tile of 128 × 128 reads 2 · 128 numbers of 2 bytes for 2 · 128 · 128 operations; a result is 2 more in 2 · 2048
    assert asked[2] == pytest.approx(1e6 * (2 * 128 * 2 / (2 * 128 * 128) + 2 / (2 * 2048)))
    assert kernels.NOT_RECORDED in viz.draw_stages(None).alt
    with pytest.raises(ValueError, match="no step of the optimisation ran"):
        viz.draw_stages({"steps": [{"candidates": {"one": {"failed": "x"}}}]})


def test_bytes_of_a_block_by_hand():
    found = kernels.bytes_of_steps(n_tokens=3, top_k=2, d_model=5, d_ff=7, element_size=1)
    tokens, rows, hidden = 3 * 5, 3 * 2 * 5, 3 * 2 * 7
    assert sum(found["step by step"].values()) == 2 * tokens + 4 * rows + 6 * hidden
    assert sum(found["fused"].values()) == 2 * tokens + 2 * rows + 2 * hidden
    assert found["step by step"]["SwiGLU"] == 3 * hidden  # reads gate and up, writes their product
    assert "step by step 7.0 GB; fused 3.2 GB" in viz.draw_fusion(32768, 8, 2048, 768).alt


SASS = """
	.headerflags	@"EF_CUDA_TEXT_MODE(TEXT)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ; /* 0x00 */
        /*0020*/                   EXIT ;                                 /* 0x000000000000794d */
"""


# As much of a `MachineCode` as is shown.
CODE = SimpleNamespace(
    name="product",
    capability=90,
    sass=SASS,
    instructions={"LDC": 1, "HGMMA": 4, "EXIT": 1},
    registers=168,
    spills=0,
    local_bytes=0,
    shared_bytes=98304,
)


def test_machine_code_in_brief():
    assert kernels.excerpt(SASS, "HGMMA", 3) == [
        "LDC R1, c[0x0][0x28] ;",
        "@!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;",
        "EXIT ;",
    ]
    shown = viz.show_machine_code(CODE, lines=2)
    assert repr(shown) == "product, compiled for compute capability 9.0: has HGMMA"
    html = shown._repr_html_()
    assert "HGMMA, in 4 places" in html
    assert "168 of 255" in html
    assert "96 KB" in html
    assert "<strong>@!P0 HGMMA" in html
    missing = viz.show_machine_code(CODE, instruction="UTCHMMA")
    assert repr(missing) == "product, compiled for compute capability 9.0: does not have UTCHMMA"
    assert "<pre" not in missing._repr_html_()


def test_a_plan_is_what_is_drawn():
    groups, _, sizes = kernels.plan_tiles(torch.tensor([5, 5, 11, 12, 15]).int(), 15, 4).tolist()
    assert sum(sizes) == 15
    assert groups.count(-1) == 2
