import pytest

from moe_lab.accounting import cache_bytes, decode_flops, decode_reads, six_nd, training_flops_per_token
from moe_lab.config import LMConfig
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
    nan, infinite = float("nan"), float("inf")
    for wrong in (
        {"flops": -1.0, "bytes": 1.0},
        {"flops": 1.0, "bytes": 0.0},
        {"flops": nan, "bytes": 1.0},
        {"flops": 1.0, "bytes": infinite},
        {"flops": "1", "bytes": 1.0},
    ):
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


# One layer, 4 wide, 2 heads of 2, an FFN of 3 x 4 x 3, a vocabulary of 10. Two prompts of three tokens: for each
# 2 * 3 * 64 + 2 * 3 * 36 in matrices, 2 heads * 6 pairs * 2 * (2 + 2) in scores, and the head once, 2 * 40.
# Bytes: 64 + 36 + 40 weights and 3 norms of 4 at two each; of each prompt 3 tokens * 8 numbers * 2.
def test_prefill_by_hand():
    small = LMConfig(vocab_size=10, d_model=4, n_layers=1, n_heads=2, d_ff=3)
    assert prefill(small, 3, batch=2) == Work(flops=2 * (384 + 216 + 96 + 80), bytes=2 * 152 + 2 * 48)
    assert prefill(small, 1).flops == decode(small, 1, 0).flops == 128 + 72 + 16 + 80


def test_prefill_and_decode_by_their_parts():
    work = prefill(V3, 100, batch=3, number="fp8")
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
    for wrong in ((float("nan"), 0.5), (flops, float("nan"))):
        with pytest.raises(ValueError, match=r"nan.*: expected 0 or more"):
            gpu_hours(wrong[0], gpu, wrong[1])
        with pytest.raises(ValueError, match=r"nan.*: expected 0 or more"):
            utilisation(*wrong, gpu)
    with pytest.raises(ValueError, match="hours=0: expected 0 or more, and more than 0"):
        utilisation(flops, 0, gpu)


def test_work_tells_its_three_numbers():
    assert str(Work(flops=3e12, bytes=1.5e9)) == "3 TFLOP, 1.5 GB: 2000 operations per byte"


def test_tokens_per_second():
    step = Work(flops=50.0, bytes=50.0)
    assert step.tokens_per_second(TOY, 10) == 2
    assert step.tokens_per_second(TOY, 10, n_gpus=4) == 8
    assert step.seconds(TOY, n_gpus=4) == 1.25
    for name, wrong in {"batch": 0, "n_gpus": 1.5}.items():
        with pytest.raises(ValueError, match=f"{name}={wrong}: expected 1 or more, a whole number"):
            step.tokens_per_second(TOY, **{"batch": 1} | {name: wrong})


@pytest.mark.parametrize("wrong", [0, -1, 2.5, float("nan"), True])
def test_no_part_of_a_sequence_is_served(wrong):
    calls = {
        "tokens": lambda: prefill(V3, wrong),
        "batch": lambda: prefill(V3, 10, batch=wrong),
        "batch ": lambda: decode(V3, wrong, 10),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name.strip()}={wrong}: expected 1 or more, a whole number"):
            call()


@pytest.mark.parametrize("wrong", [-1, 2.5, float("nan")])
def test_no_part_of_a_position_is_behind(wrong):
    with pytest.raises(ValueError, match=f"^context={wrong}: expected 0 or more, a whole number"):
        decode(V3, 1, wrong)


# Mixtral 8x22B against Llama 3 70B, both in bf16 on H200s that share the work evenly: a step of the sparse one is
# shorter for two sequences, longer for three, and shorter again from the batch on that the ledger names (claim S2.10).
@pytest.mark.parametrize(("context", "again"), [(0, 417), (4096, 353)])
def test_where_a_sparse_model_wins_again(context, again):
    sparse, dense = (PRESETS[name].config for name in ("Mixtral 8x22B", "Llama 3 70B"))

    def is_shorter(batch):
        steps = (decode(config, batch, context) for config in (sparse, dense))
        return next(steps).seconds(GPUS["H200"]) < next(steps).seconds(GPUS["H200"])

    found = {batch: is_shorter(batch) for batch in (1, 2, 3, 64, again - 1, again, 512, 2048)}
    assert found == {batch: batch < 3 or batch >= again for batch in found}


def test_4_bit_weights_are_read_as_such_and_multiplied_as_bf16():
    config = PRESETS["gpt-oss-120b"].config
    step = decode(config, 1, 0, "mxfp4")
    assert step.bytes == decode_reads(config, 1) * 4.25 / 8
    assert step.seconds(GPUS["H100"]) == pytest.approx(step.bytes / 3.35e12)
    with pytest.raises(ValueError, match="number='mxfp4': the H100 multiplies bf16, fp8"):
        step.seconds(GPUS["H100"], "mxfp4")
