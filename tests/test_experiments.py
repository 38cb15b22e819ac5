"""Experiments: how runs are made, kept and read back; what the scripts ask; that what is recorded answers it."""

import json
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_lab import experiments
from moe_lab.accounting import count_parameters
from moe_lab.balance import max_violation
from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, TrainConfig
from moe_lab.data import Corpus, encode, load_corpus, validation_batch
from moe_lab.dispatch import expert_capacity, make_plan
from moe_lab.experiments import Variant, load_results, measure_routing, run_experiment, run_once
from moe_lab.lm import LM
from moe_lab.paths import CourseError
from moe_lab.plain import from_plain, read_config, to_plain
from moe_lab.presets import BASELINE_TRAINING, MOE_BASELINE
from moe_lab.train import Trainer, choices_of, evaluate, train

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "benchmarks" / "experiments").glob("*.py"))
RECORDS = sorted((ROOT / "benchmarks" / "results" / "experiments").glob("*.json"))
EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

TEXT = {"letters": encode("abcdefgh" * 60), "digits": encode("0123456789" * 50)}
CORPUS = Corpus(train=TEXT, val=TEXT)
EXPERTS = MoEConfig(d_model=8, d_ff=6, n_experts=4, top_k=2)
MODEL = LMConfig(d_model=8, n_layers=2, n_heads=2, d_ff=10, moe=EXPERTS)
TRAINING = TrainConfig(steps=5, batch_size=4, context=8, warmup_steps=1)
TINY = Variant("tiny", MODEL, TRAINING, follow_churn=True)


def numbers(value: object) -> list[float]:
    """Every number in a record."""
    if isinstance(value, Mapping):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


# --- one run ------------------------------------------------------------------------------------------------------


def test_a_run_is_a_training_with_its_seed_and_what_was_measured_of_it():
    record = run_once(TINY, CORPUS, seed=3)
    torch.manual_seed(3)
    model = LM(MODEL)
    steps = train(model, TEXT, TRAINING.but(seed=3))
    bits = evaluate(model, TEXT, context=8)
    assert (record["variant"], record["seed"]) == ("tiny", 3)
    assert from_plain(LMConfig, record["model"]) == MODEL
    assert from_plain(TrainConfig, record["training"]) == TRAINING.but(seed=3)
    assert record["bits_per_byte"] == bits
    assert record["mean"] == pytest.approx(sum(bits.values()) / 2)
    assert [point["step"] for point in record["curve"]] == [1, 2, 3, 4, 5]
    assert [point["bits_per_byte"] for point in record["curve"]] == [step.bits_per_byte for step in steps]
    loads = [[layer.tolist() for layer in step.tokens_per_expert] for step in steps]
    assert [point["load"] for point in record["curve"]] == loads
    assert record["layers"] == measure_routing(model, validation_batch(TEXT, context=8, limit=64))
    assert all(map(math.isfinite, numbers(record)))
    assert json.loads(json.dumps(record)) == record


def test_the_same_seed_gives_the_same_record_whatever_the_generator_did_before():
    once = run_once(TINY, CORPUS, seed=0)
    torch.rand(5)
    assert run_once(TINY, CORPUS, seed=0) == once
    assert run_once(TINY, CORPUS, seed=1)["mean"] != once["mean"]


def test_looking_at_churn_changes_nothing_else():
    jittery = Variant("x", MODEL.but(moe=EXPERTS.but(input_jitter=0.2)), TRAINING)
    plain = run_once(jittery, CORPUS, seed=0)
    followed = run_once(Variant("x", jittery.model, TRAINING, follow_churn=True), CORPUS, seed=0)
    churns = [point.pop("churn", None) for point in followed["curve"]]
    assert followed == plain
    assert churns[0] is None  # there is nothing before it
    assert all(len(churn) == 2 and all(0 <= share <= 1 for share in churn) for churn in churns[1:])
    assert any(share > 0 for churn in churns[1:] for share in churn)


@pytest.mark.parametrize(("steps", "points"), [(1, [1]), (20, [*range(1, 21)]), (41, [*range(3, 40, 3), 41])])
def test_a_curve_has_at_most_twenty_points_and_its_loads_are_summed_in_between(steps, points):
    variant = Variant("x", MODEL.but(n_layers=1), TRAINING.but(steps=steps))
    curve = run_once(variant, CORPUS, seed=0)["curve"]
    assert [point["step"] for point in curve] == points
    assert len(curve) <= 20
    seen = [b - a for a, b in zip([0, *points], points, strict=False)]
    assert [sum(point["load"][0]) for point in curve] == [n * 4 * 8 * 2 for n in seen]


def test_runs_of_dense_models_and_of_experts_that_choose():
    dense = run_once(Variant("dense", MODEL.but(moe=None), TRAINING, follow_churn=True), CORPUS, seed=0)
    assert dense["layers"] == []
    assert all(point["load"] == [] for point in dense["curve"])
    choosing = run_once(Variant("choosing", MODEL.but(moe=EXPERTS.but(expert_choice=True)), TRAINING), CORPUS, seed=0)
    assert [layer["max_violation"] for layer in choosing["layers"]] == [0, 0]
    assert all(layer.keys() == {"max_violation", "entropy", "dead"} for layer in choosing["layers"])
    json.dumps([dense, choosing])


def test_what_is_measured_of_a_layer():
    torch.manual_seed(0)
    model, probe = LM(MODEL), validation_batch(TEXT, context=8, limit=5)
    measured = measure_routing(model, probe)
    for layer, routing in zip(measured, choices_of(model, probe.inputs), strict=True):
        capacity = expert_capacity(2 * 5 * 8, 2, 4, 1.25)
        assert layer["dropped"] == pytest.approx(make_plan(routing, capacity).dropped.float().mean().item(), abs=1e-6)
        assert layer["max_violation"] == pytest.approx(max_violation(routing.tokens_per_expert).item())
        assert layer["mean_logsumexp"] == pytest.approx(routing.router_logits.logsumexp(-1).mean().item())
        # letters and digits share no byte: knowing the byte, nothing is left to tell
        assert (layer["information"], layer["information_shuffled"]) == pytest.approx((0, 0), abs=1e-9)
    assert measure_routing(model, probe) == measured  # the shuffle, too, has a seed


def test_information_is_of_the_real_text_and_above_its_shuffle():
    torch.manual_seed(0)
    model, probe = LM(MOE_BASELINE), validation_batch(load_corpus().val, context=64, limit=8)
    for layer in measure_routing(model, probe):
        assert 0 <= layer["information_shuffled"] < layer["information"] < 2


# --- records, kept ------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Results go to a temporary folder; runs are quick, and listed as they are made."""
    made = []

    def run(variant: Variant, corpus: Corpus, seed: int, device: str) -> dict:
        made.append((variant.name, seed))
        training = variant.training.but(seed=seed)
        return {
            "variant": variant.name,
            "seed": seed,
            "model": to_plain(variant.model),
            "training": to_plain(training),
            "mean": 2.0 + seed + 1 / 3,
            "curve": [{"step": 1}, {"step": 2, **({"churn": [0.5]} if variant.follow_churn else {})}],
            "layers": [{"entropy": 0.123456789}],
        }

    monkeypatch.setattr(experiments, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(experiments, "run_once", run)
    monkeypatch.setattr(experiments, "load_corpus", lambda: CORPUS)
    return made


ONE, TWO = Variant("one", MODEL, TRAINING), Variant("two", MODEL.but(moe=None), TRAINING.but(learning_rate=1 / 3))


def test_every_variant_runs_with_every_seed_seed_by_seed(kept, capsys):
    results = run_experiment("quick", "Why?", [ONE, TWO], 2)
    assert kept == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert capsys.readouterr().out.splitlines()[-1] == "two, seed 1: 3.333 bits per byte"
    read = load_results("quick")
    assert (read.question, read.variants) == ("Why?", ["one", "two"]) == (results.question, results.variants)
    assert read.stamp["device"] == "cpu"
    assert {"date", "cpu", "system", "python", "torch"} <= read.stamp.keys()
    assert [(run["variant"], run["seed"]) for run in read.runs] == kept


def test_measurements_are_kept_to_five_digits_and_configurations_exactly(kept):
    run_experiment("quick", "Why?", [TWO], 1)
    (run,) = load_results("quick").runs
    assert run["mean"] == 2.3333
    assert run["layers"] == [{"entropy": 0.12346}]
    assert load_results("quick").configs("two") == (TWO.model, TWO.training)


def test_what_is_recorded_is_not_run_again(kept):
    run_experiment("quick", "Why?", [ONE, TWO], 2)
    before = experiments.results_file("quick").read_bytes()
    kept.clear()
    run_experiment("quick", "Why?", [ONE, TWO], 2)
    assert kept == []
    assert experiments.results_file("quick").read_bytes() == before


def test_a_stopped_experiment_goes_on_where_it_was(kept, monkeypatch):
    run = experiments.run_once

    def interrupted(variant: Variant, corpus: Corpus, seed: int, device: str) -> dict:
        if (variant.name, seed) == ("one", 1):
            raise KeyboardInterrupt
        return run(variant, corpus, seed, device)

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "run_once", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment("quick", "Why?", [ONE, TWO], 2)
    assert [(run["variant"], run["seed"]) for run in load_results("quick").runs] == [("one", 0), ("two", 0)]
    kept.clear()
    run_experiment("quick", "Why?", [ONE, TWO], 2)
    assert kept == [("one", 1), ("two", 1)]
    assert len(load_results("quick").runs) == 4


@pytest.mark.parametrize(
    "changed",
    [
        Variant("one", MODEL.but(d_ff=12), TRAINING),
        Variant("one", MODEL, TRAINING.but(learning_rate=0.02)),
        Variant("one", MODEL, TRAINING.but(balance=BalanceConfig(alpha=1e-5))),
    ],
    ids=["model", "training", "balance"],
)
def test_a_variant_that_is_another_now_is_run_again_and_only_it(changed, kept):
    run_experiment("quick", "Why?", [ONE, TWO], 2)
    kept.clear()
    run_experiment("quick", "Why?", [changed, TWO], 2)
    assert kept == [("one", 0), ("one", 1)]
    assert load_results("quick").configs("one", seed=1) == (changed.model, changed.training.but(seed=1))


def test_variants_and_seeds_that_nobody_asks_for_any_more_are_dropped(kept):
    run_experiment("quick", "Why?", [ONE, TWO], 3)
    kept.clear()
    run_experiment("quick", "Why?", [TWO, Variant("three", MODEL, TRAINING)], 1)
    assert kept == [("three", 0)]
    assert [(run["variant"], run["seed"]) for run in load_results("quick").runs] == [("two", 0), ("three", 0)]
    assert {path.name for path in experiments.results_file("quick").parent.iterdir()} == {"quick.json"}


def test_a_stamp_says_where_the_runs_were_made_not_where_they_were_last_looked_at(kept, monkeypatch):
    run_experiment("quick", "Why?", [ONE], 1)
    before = load_results("quick").stamp
    monkeypatch.setattr(experiments, "machine", lambda: {"cpu": "another"})
    run_experiment("quick", "Why?", [ONE], 1)
    assert load_results("quick").stamp == before


def test_a_variant_whose_churn_is_asked_for_now_is_run_again(kept):
    run_experiment("quick", "Why?", [ONE], 1)
    kept.clear()
    run_experiment("quick", "Why?", [Variant("one", MODEL, TRAINING, follow_churn=True)], 1)
    assert kept == [("one", 0)]


def test_a_real_run_goes_through_the_file_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(experiments, "load_corpus", lambda: CORPUS)
    run_experiment("real", "Why?", [TINY], 1)
    (run,) = load_results("real").runs
    again = run_once(TINY, CORPUS, seed=0)
    assert numbers(run) == pytest.approx(numbers(again), rel=1e-4)


# --- records, read ------------------------------------------------------------------------------------------------


@pytest.fixture
def results(kept):
    run_experiment("quick", "Why?", [ONE, TWO], 3)
    return load_results("quick")


def test_results_are_read_by_variant_measure_and_layer(results):
    assert [run["seed"] for run in results.of("two")] == [0, 1, 2]
    assert results.values("one", "mean") == [2.3333, 3.3333, 4.3333]
    assert results.values("one", "entropy", layer=0) == [0.12346] * 3
    assert results.band("one") == (2.3333, pytest.approx(3.3333), 4.3333)
    assert results.band("one", "entropy", 0) == pytest.approx((0.12346,) * 3)
    assert results.configs("two", seed=2) == (TWO.model, TWO.training.but(seed=2))


def test_an_unknown_variant_is_named_with_those_there_are(results):
    for ask in (results.of, results.configs, lambda name: results.values(name, "mean"), results.band):
        with pytest.raises(ValueError, match=r"variant='three': expected one of one, two\."):
            ask("three")


def test_an_unknown_seed_is_named(results):
    with pytest.raises(ValueError, match="seed=9"):
        results.configs("one", seed=9)


def test_nothing_recorded_says_what_to_run(kept):
    with pytest.raises(CourseError, match=r"none\.json does not exist: run `python benchmarks/experiments/none\.py`"):
        load_results("none")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"question": "Why?"}', '{"runs": [], "colour": 1}'])
def test_damaged_records_are_told_with_their_remedy(text, kept):
    path = experiments.results_file("quick")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(CourseError, match=r"quick\.json is damaged \(.*\): restore it with git, or run its script"):
        load_results("quick")
    with pytest.raises(CourseError, match="is damaged"):  # and it is not written over
        run_experiment("quick", "Why?", [ONE], 1)
    assert path.read_text() == text


def test_an_experiment_describes_itself(results):
    assert experiments.describe("quick").startswith("2 variants, 3 seeds, recorded 2")
    assert experiments.describe("quick").endswith("Again: python benchmarks/experiments/quick.py")
    assert experiments.describe("quick", "moe_10m") == (
        "Nothing is recorded here yet. On a machine with a GPU: "
        "python benchmarks/experiments/quick.py --base configs/moe_10m.yaml --device cuda"
    )


# --- the scripts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a script asks for, as it tells `main`."""

    question: str
    variants: Callable[[LMConfig, TrainConfig], Sequence[Variant]]
    n_seeds: int


def asked_by(script: Path, monkeypatch) -> Asked:
    told = []
    monkeypatch.setattr(
        experiments, "main", lambda path, question, variants, n_seeds: told.append(Asked(question, variants, n_seeds))
    )
    runpy.run_path(str(script), run_name="__main__")
    return told[0]


def base_of(name: str) -> tuple[LMConfig, TrainConfig]:
    """The model and the training that a script starts from: the notebooks', or those of a configuration."""
    if not name:
        return MOE_BASELINE, BASELINE_TRAINING
    return experiments.without_cures(read_config(ROOT / "configs" / f"{name}.yaml"))


@EVERY_SCRIPT
def test_a_script_asks_a_question_and_says_what_it_expects(script, monkeypatch):
    asked = asked_by(script, monkeypatch)
    assert asked.question.endswith("?")
    assert "Predicted" in runpy.run_path(str(script))["__doc__"]
    assert asked.n_seeds >= 3


@pytest.mark.parametrize("base", ["", "moe_10m", "moe_100m"])  # benchmarks/README.md names the first
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_variant_can_be_trained_and_is_what_its_name_says(script, base, monkeypatch):
    variants = asked_by(script, monkeypatch).variants(*base_of(base))
    assert len({variant.name for variant in variants}) == len(variants) > 1
    assert len({(variant.model, variant.training, variant.follow_churn) for variant in variants}) == len(variants)
    models = {}
    for variant in variants:
        if variant.model not in models:
            with torch.device("meta"):
                models[variant.model] = LM(variant.model)
        Trainer(models[variant.model], TEXT, variant.training)
        assert from_plain(LMConfig, to_plain(variant.model)) == variant.model
        if "no cure" in variant.name:
            assert variant.training.balance == BalanceConfig()
        if "dense" in variant.name:
            assert variant.model.moe is None
        if "bias" in variant.name:
            assert variant.training.balance.alpha == 0
            assert variant.training.balance.bias_rate > 0


def sizes(model: LMConfig) -> tuple[int, int]:
    """Weights in FFNs and experts, in all and for one token."""
    counts = [count_parameters(model, active=active) for active in (False, True)]
    return tuple(count.ffn + count.experts + count.shared_experts for count in counts)


def test_models_that_are_said_to_be_equal_in_size_are(monkeypatch):
    folder = ROOT / "benchmarks" / "experiments"
    start = base_of("")
    variants = {v.name: v for v in asked_by(folder / "moe_against_dense.py", monkeypatch).variants(*start)}
    total, active = sizes(MOE_BASELINE)
    assert sizes(variants["MoE"].model) == sizes(variants["MoE, frozen router"].model) == (total, active)
    assert sizes(variants["dense, equal active"].model) == (active, active)
    assert sizes(variants["dense, equal total"].model) == (total, total)
    assert sizes(variants["MoE, top-1"].model)[1] == active
    assert variants["MoE, frozen router"].training.router_rate == 0
    for variant in asked_by(folder / "shared_experts.py", monkeypatch).variants(*start):
        model = variant.model
        gates = model.n_moe_layers * model.d_model * model.moe.shared_gate
        assert sizes(model) == (total + gates, active + gates), variant.name


def test_the_command_of_a_script_runs_its_variants(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quick.py", "--seeds", "2"])
    monkeypatch.setattr(experiments, "course_root", lambda: tmp_path)
    threads = torch.get_num_threads()
    try:
        experiments.main("somewhere/quick.py", "Why?", lambda model, training: [Variant("v", model, training)], 5)
    finally:
        torch.set_num_threads(threads)
    assert kept == [("v", 0), ("v", 1)]
    assert capsys.readouterr().out.splitlines()[-1] == f"Kept in {Path('experiments') / 'quick.json'}."
    assert load_results("quick").configs("v") == (MOE_BASELINE, BASELINE_TRAINING)


def test_another_base_is_kept_under_another_name(kept, tmp_path, monkeypatch):
    base = ROOT / "configs" / "moe_2m.yaml"
    monkeypatch.setattr("sys.argv", ["quick.py", "--seeds", "1", "--base", str(base)])
    monkeypatch.setattr(experiments, "course_root", lambda: tmp_path)
    threads = torch.get_num_threads()
    try:
        experiments.main("quick.py", "Why?", lambda model, training: [Variant("v", model, training)], 5)
    finally:
        torch.set_num_threads(threads)
    assert load_results("quick-moe_2m").configs("v") == base_of("moe_2m")
    assert base_of("moe_2m")[1].balance == BalanceConfig() != read_config(base).training.balance


def test_a_dense_base_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["quick.py", "--base", str(ROOT / "configs" / "dense_notebook.yaml")])
    with pytest.raises(CourseError, match="--base is a dense model"):
        experiments.main("quick.py", "Why?", lambda model, training: [Variant("v", model, training)], 5)


# --- what is recorded ---------------------------------------------------------------------------------------------


def test_every_record_has_a_script_and_every_script_a_record():
    assert {path.stem.split("-")[0] for path in RECORDS} == {path.stem for path in SCRIPTS}
    assert {path.stem for path in SCRIPTS} <= {path.stem for path in RECORDS}  # on the notebooks' small model


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_what_is_recorded_is_what_the_script_asks_for_today(record, monkeypatch):
    name, _, base = record.stem.partition("-")
    asked = asked_by(ROOT / "benchmarks" / "experiments" / f"{name}.py", monkeypatch)
    results = load_results(record.stem)
    variants = asked.variants(*base_of(base))
    assert results.question == asked.question
    assert results.variants == [variant.name for variant in variants]
    seeds = range(len(results.runs) // len(variants))
    assert len(seeds) >= 3 if base else len(seeds) == asked.n_seeds
    assert [(run["variant"], run["seed"]) for run in results.runs] == [(v.name, s) for s in seeds for v in variants]
    for run, variant in zip(results.runs, [*variants] * len(seeds), strict=True):
        assert results.configs(variant.name, run["seed"]) == (variant.model, variant.training.but(seed=run["seed"]))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_what_is_recorded_is_whole_finite_and_stamped(record):
    results = load_results(record.stem)
    assert {"date", "cpu", "system", "python", "torch", "device"} <= results.stamp.keys()
    assert all(results.stamp.values())
    text = record.read_text(encoding="utf-8")
    assert not any(private in text for private in (str(Path.home()), "/tmp", "/work", "/root"))
    for run in results.runs:
        model, training = results.configs(run["variant"], run["seed"])
        assert all(map(math.isfinite, numbers(run)))
        assert run["bits_per_byte"].keys() == {"prose", "python", "arithmetic", "languages"}
        assert run["mean"] == pytest.approx(sum(run["bits_per_byte"].values()) / 4, rel=1e-4)
        assert 0 < run["mean"] < 8
        assert len(run["layers"]) == model.n_moe_layers
        assert run["curve"][-1]["step"] == training.steps
        if model.moe:
            per_step = training.batch_size * training.context * model.moe.top_k
            for layer in range(model.n_moe_layers):
                counted = sum(sum(point["load"][layer]) for point in run["curve"])
                assert counted == training.steps * per_step
            assert all(-1e-5 <= layer["max_violation"] <= model.moe.n_experts - 1 for layer in run["layers"])
            assert all(0 <= layer["entropy"] <= 1 for layer in run["layers"])
