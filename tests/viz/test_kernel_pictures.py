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
    "ceilings": {"operations_per_second": 500e12, "bytes_per_second": 2e12},
    "steps": [
        {
            "flops": 900.0,
            "bytes": 3.0,
            "candidates": {
                "a library's": {"tflops": 40.0},
                "small": {"flops_per_byte": 10.0, "tflops": 50.0},
                "no": {"failed": "no"},
            },
        }
    ],
}
NO_CEILINGS = MEASURED | {"ceilings": {"operations_per_second": None, "bytes_per_second": None}}


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
    assert kernels.roof(corner) == kernels.roof(10 * corner) == 989.5
    alt = viz.draw_roofline({"a": 10.0, "b": (20.0, 33.0)}).alt
    assert "a at 10, not measured, the roof there is 48 TFLOP/s" in alt
    assert "b at 20, 33 TFLOP/s" in alt
    assert "Roofline (H200, datasheet)" in alt
    assert "stay at 989." in alt


def test_the_roof_is_that_of_the_gpu_which_was_measured():
    rates = kernels.rates_of(MEASURED)
    assert (rates.operations, rates.bytes) == (500e12, 2e12)
    assert kernels.roof(100, rates) == pytest.approx(200)
    assert kernels.roof(1000, rates) == pytest.approx(500)
    assert kernels.sweep_limit(4096, rates) == pytest.approx(500)
    assert kernels.rates_of(None) is kernels.H200
    for without in (NO_CEILINGS, {name: part for name, part in MEASURED.items() if name != "ceilings"}):
        assert kernels.rates_of(without) is None
        assert "limit" not in viz.draw_throughput(without).alt
        stages = viz.draw_stages(without).alt
        assert "Roofline" not in stages
        assert "small at 10, 50 TFLOP/s" in stages
        assert kernels.ONCE not in stages  # it was not measured, and there is no roof to stand on


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
    assert "column by column: 12 tiles of rows and 2 of columns; in bands of 4: 4 tiles of rows and 4 of columns" in alt
    # 16 at once in columns of 5: three full ones and a part
    assert "column by column: 5 tiles of rows and 4 of columns" in viz.draw_tile_order(5, 7, 4).alt


def test_the_limit_of_the_sweep_and_what_was_measured():
    assert int(kernels.sweep_limit(4096)) == 989
    assert kernels.sweep_limit(4) < 20
    assert kernels.NOT_RECORDED in viz.draw_throughput(None).alt
    alt = viz.draw_throughput(MEASURED).alt
    assert "with TMA (by default) reaches 16 TFLOP/s; dense reaches 24 TFLOP/s." in alt
    assert "The limit (a dense product and a copy) rises to 500" in alt
    assert kernels.NOT_RECORDED not in alt


def test_the_steps_of_the_optimisation():
    assert kernels.stages_of(MEASURED) == {
        "a library's": (None, 40.0),
        "small": (10.0, 50.0),
        kernels.ONCE: (300.0, None),
    }
    alt = viz.draw_stages(MEASURED).alt
    assert alt.startswith(
        "a GPU of this test, torch 2.0, triton 3.0, 2026-01-02. Roofline (a dense product and a copy)"
    )
    assert "a library's at an unknown place, 40 TFLOP/s; small at 10, 50 TFLOP/s;" in alt
    assert "every number read once at 300, not measured, the roof there is 500 TFLOP/s" in alt
    assert kernels.NOT_RECORDED not in alt
    with pytest.raises(ValueError, match="no step of the optimisation ran"):
        viz.draw_stages({"steps": [{"flops": 1.0, "bytes": 1.0, "candidates": {"one": {"failed": "x"}}}]})


def test_the_steps_without_a_recording_stand_on_the_roof():
    points = kernels.stages_of(None)
    assert all(rate is None for _, rate in points.values())
    intensities = [intensity for intensity, _ in points.values()]
    assert len(intensities) == 5
    assert intensities == sorted(intensities)
    # a tile of 128 × 128 reads 2 · 128 numbers of 2 bytes for 2 · 128 · 128 operations; a result is 2 more in 2 · 2048
    assert intensities[2] == pytest.approx(1 / (2 * 128 * 2 / (2 * 128 * 128) + 2 / (2 * 2048)))
    alt = viz.draw_stages(None).alt
    assert kernels.NOT_RECORDED in alt
    assert "tiles of 128 × 128 at 62, not measured, the roof there is 297 TFLOP/s" in alt


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
    constants={"num_warps": 8},
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
    assert "<td>programs on a processor at once</td><td>1</td>" in html
    assert "<strong>@!P0 HGMMA" in html
    missing = viz.show_machine_code(CODE, instruction="UTCHMMA")
    assert repr(missing) == "product, compiled for compute capability 9.0: does not have UTCHMMA"
    assert "<pre" not in missing._repr_html_()


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 1),  # 256 threads of 168 registers: 43,008 of 65,536
        ({"registers": 103}, 2),  # of 104: 26,624; and 97 KB of 228, twice
        ({"registers": 103, "shared_bytes": 116 * 1024}, 1),
        ({"registers": 32, "shared_bytes": 0}, 8),  # 64 warps, of 8 each
        ({"registers": 24, "shared_bytes": 0, "constants": {"num_warps": 1}}, 32),
        ({"registers": 103, "capability": 80}, 1),
        ({"capability": 100}, None),
        ({"constants": {}}, None),
    ],
)
def test_programs_that_find_room_on_a_processor(changes, programs):
    assert kernels.programs_at_once(SimpleNamespace(**vars(CODE) | changes)) == programs


def test_a_plan_is_what_is_drawn():
    groups, _, sizes = kernels.plan_tiles(torch.tensor([5, 5, 11, 12, 15]).int(), 15, 4).tolist()
    assert sum(sizes) == 15
    assert groups.count(-1) == 2
