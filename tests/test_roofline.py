import pytest

from moe_lab.accounting import cache_bytes, count_flops, decode_flops, decode_reads, six_nd, training_flops_per_token
from moe_lab.presets import PRESETS
from moe_lab.roofline import GPUS, Gpu, Work, decode, gpu_hours, prefill, utilisation

V3 = PRESETS["DeepSeek-V3"].config
TOY = Gpu(name="toy", memory=1e9, bytes_per_second=10.0, operations={"bf16": 100.0}, source="none")


def test_the_roof_is_the_lower_of_two():
    for bytes_, seconds, reached in ((1.0, 0.5, 100.0), (5.0, 0.5, 100.0), (50.0, 5.0, 10.0)):
        work = Work(flops=50.0, bytes=bytes_)
        assert (work.seconds(TOY), work.reached(TOY)) == (seconds, reached)
        assert work.reached(TOY) == pytest.approx(work.flops / work.seconds(TOY))
    assert TOY.balance() == 10
    for wrong in ({"flops": -1.0, "bytes": 1.0}, {"flops": 1.0, "bytes": 0.0}):
        with pytest.raises(ValueError, match="expected 0 or more, and more than 0"):
            Work(**wrong)


# "To be compute-bound takes about 295 rows per expert on an H100": 989 TFLOP/s over 3.35 TB/s, at two bytes and two
# operations a weight; with fp8 twice the rate and half the bytes.
def test_an_h100_is_busy_from_295_rows_on():
    assert [round(GPUS["H100"].busy_rows(number)) for number in ("bf16", "fp8")] == [295, 295]


# Memory in GB, TB/s, dense TFLOP/s in bf16 and fp8: the data sheets that roofline.py names, halved where with sparsity.
STATED = {
    "RTX 4090": (24, 1.008, 165.2, 330.3),
    "A100": (80, 2.039, 312, None),
    "H100": (80, 3.35, 989.5, 1979),
    "H200": (141, 4.8, 989.5, 1979),
    "B200": (180, 8.0, 2250, 4500),
    "MI300X": (192, 5.3, 1307.4, 2614.9),
}


def test_gpus_are_as_stated():
    assert list(GPUS) == list(STATED)
    for name, (memory, bandwidth, bf16, fp8) in STATED.items():
        gpu = GPUS[name]
        assert (gpu.name, bool(gpu.source)) == (name, True)
        assert (gpu.memory, gpu.bytes_per_second) == (memory * 1e9, pytest.approx(bandwidth * 1e12))
        rates = {"bf16": bf16 * 1e12} | ({"fp8": fp8 * 1e12} if fp8 else {})
        assert gpu.operations == pytest.approx(rates)
    with pytest.raises(ValueError, match="number='fp8': the A100 multiplies bf16"):
        GPUS["A100"].rate("fp8")


def test_prefill_and_decode_by_their_parts():
    work = prefill(V3, 100, batch=3, number="fp8")
    assert work.flops == 3 * count_flops(V3, 100).total
    assert work.bytes == decode_reads(V3, 300) + 3 * cache_bytes(V3, 100)
    step = decode(V3, 32, 4096, "fp8")
    assert step.flops == 32 * decode_flops(V3, 4096)
    assert step.bytes == decode_reads(V3, 32) + 32 * cache_bytes(V3, 4096)
    assert step.intensity < GPUS["H200"].balance("fp8") < prefill(V3, 8192, 8, "fp8").intensity


# Zhao et al. 2025 (arXiv 2505.09343), table 4: 38.94 % of 989 TFLOP/s with causal attention, 43.73 % with all pairs. It
# counts a day of training; here it is the 2.664 million hours for 14.8 T tokens of DeepSeek-V3 (2024), table 1.
def test_published_utilisation():
    tokens, hours, gpu = 14.8e12, 2_664_000, GPUS["H100"]
    causal, full = (training_flops_per_token(V3, 4096, causal=causal) * tokens for causal in (True, False))
    assert utilisation(causal, hours, gpu) == pytest.approx(0.3894, abs=0.002)
    assert utilisation(full, hours, gpu) == pytest.approx(0.4373, abs=0.002)
    assert utilisation(six_nd(V3, tokens), hours, gpu) == pytest.approx(0.343, abs=5e-4)


def test_hours_and_utilisation_undo_each_other():
    flops, gpu = six_nd(V3, 14.8e12), GPUS["H100"]
    assert utilisation(flops, gpu_hours(flops, gpu, 0.4), gpu) == pytest.approx(0.4)
    for wrong in ((flops, 0), (flops, 1.1), (flops, -1), (-1.0, 0.5)):
        with pytest.raises(ValueError, match="expected 0 or more, and more than 0 and at most 1"):
            gpu_hours(wrong[0], gpu, wrong[1])
    with pytest.raises(ValueError, match="hours=0: expected more than 0"):
        utilisation(flops, 0, gpu)


def test_work_tells_its_three_numbers():
    assert str(Work(flops=3e12, bytes=1.5e9)) == "3 TFLOP, 1.5 GB: 2000 operations per byte"
