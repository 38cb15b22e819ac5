"""The moe-lab command: one sub-command's module at a time, sentences for mistakes, exit statuses."""

import importlib
import json
import os
import subprocess
import sys
import types

import pytest

from moe_lab import __version__, cli
from moe_lab.paths import CourseError
from moe_lab.presets import PRESETS, UNDISCLOSED


def fake(main) -> types.SimpleNamespace:
    return types.SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--port", type=int), main=main)


@pytest.fixture
def doctor(monkeypatch):
    """Puts a function in place of the doctor's module; returns what was imported."""
    imported = []

    def replace(main):
        def load(name):
            imported.append(name)
            return fake(main)

        monkeypatch.setattr(importlib, "import_module", load)
        return imported

    return replace


def test_only_the_module_asked_for_is_imported(doctor):
    imported = doctor(lambda args: args.port)
    assert cli.main(["doctor", "--port", "5"]) == 5
    assert imported == ["moe_lab.course.doctor"]


def test_a_mistake_is_one_sentence(doctor, capsys):
    def fail(args):
        raise CourseError("No corpus: bring it back.")

    doctor(fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr() == ("", "No corpus: bring it back.\n")


def test_ctrl_c_is_quiet(doctor, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    doctor(interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes end in another way there")
def test_a_reader_that_has_enough_is_no_error():
    """As `moe-lab claims | head` has it: the pipe is closed before anything is written."""
    code = "import sys; sys.stdin.read(); from moe_lab.cli import main; sys.exit(main(['count']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_without_a_command_it_explains_itself(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in cli.COMMANDS)


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doktor"])
    assert stopped.value.code == 2
    assert "doktor" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"moe-lab {name}" in capsys.readouterr().out


def test_python_m_moe_lab_is_the_same():
    done = subprocess.run([sys.executable, "-m", "moe_lab", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"moe-lab {__version__}")


def test_a_poor_terminal_gets_a_question_mark_and_no_traceback():
    code = "from moe_lab import cli; cli.main(['--nothing ×'])"
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=poor)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# --- moe-lab count ----------------------------------------------------------------------------------------------------


def said(capsys, *arguments: str) -> str:
    """What a command prints, having succeeded."""
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def refused(capsys, *arguments: str) -> str:
    """The sentence with which a command ends."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def rows(text: str, title: str) -> dict[str, list[str]]:
    """A table's cells by the names of its rows."""
    lines = text.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
    cells = (line.split("  ") for line in lines)
    return {name: [cell.strip() for cell in others if cell.strip()] for _, name, *others in cells if name}


def test_counts_of_a_released_model(capsys):
    text = said(capsys, "count", "deepseek v3")
    parameters = rows(text, "Parameters")
    assert parameters["experts"] == ["653,908,770,816", "20,434,649,088"]
    assert parameters["total"] == ["671,026,419,200", "37,552,297,472"]
    assert parameters["total without embedding"][1] == "36,625,618,432"
    memory = rows(text, "Memory")
    assert memory["weights in bf16, GB"] == ["1,342"]
    assert memory["weights in mxfp4, GB"] == ["356.5"]  # 4.25 bits each
    assert memory["weights as released, GB"] == ["673.2"]
    assert memory["in training with Adam, GB"] == ["10,736"]
    assert memory["bf16 cache of a token, bytes"] == ["70,272"]
    assert memory["bf16 cache of 131,072 tokens, GB"] == ["9.211"]
    costs = rows(text, "GFLOPs for a token")
    assert costs["training on 4,096 tokens"] == ["250.5"]
    assert costs["prefill of 4,096 tokens"] == ["81.63"]  # a third of it, but for the head: 2 * 129,280 * 7,168 once
    assert "Latent attention decodes in the space of the latent" in text
    decoding = rows(text, "a token a sequence")
    assert decoding["batch 32"] == ["163.3", "866.7"]
    assert decoding["in all"] == ["256", "1,340"]
    assert "Stated: 671B in total, 37B active (fits without the embedding table)." in text
    assert "Source: DeepSeek-V3 (2024, arXiv 2412.19437), abstract." in text
    assert "11,610,068,224" in text


def test_what_is_asked_for_is_counted(capsys):
    text = said(capsys, "count", "DeepSeek-V3", "--tokens", "100", "--batch", "3", "7", "--number", "fp8")
    assert "prefill of 100 tokens" in text
    decoding = rows(text, "a token a sequence")
    assert list(decoding) == ["batch 3", "batch 7", "in all"]
    assert decoding["in all"][1] == "670.1"


def test_models_stand_side_by_side(capsys):
    text = said(capsys, "count", "Llama 3.1 405B", "DeepSeek-V3")
    every, used = rows(text, "Parameters: all"), rows(text, "Parameters: of one token")
    assert every["total"] == ["405,853,388,800", "671,026,419,200"]
    assert used["total"] == ["405,853,388,800", "37,552,297,472"]
    assert list(every)[-4:] == ["norms", "head", "total", "total without embedding"]
    assert rows(text, "GB of bf16 weights read")["batch 256"] == ["807.5", "1,340"]
    assert rows(text, "experts touched in a layer")["batch 1"] == ["8"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_released_model_can_be_counted(name, capsys):
    text = said(capsys, "count", name)
    assert text.startswith(f"{name}\n")
    assert max(map(len, text.splitlines())) <= 80
    has_mixed = PRESETS[name].released_bytes is not None
    assert has_mixed == name.startswith(("DeepSeek-V3", "DeepSeek-R1", "Kimi", "gpt-oss"))
    assert ("weights as released, GB" in text) == ("As released, parts are" in text) == has_mixed
    assert ("Latent attention" in text) == name.startswith(("DeepSeek-V", "DeepSeek-R", "Kimi"))
    assert ("Not counted of an encoder-decoder" in text) == name.startswith(("T5", "Switch"))
    assert ("of one token" in text) == (PRESETS[name].stated[1] is not None or name.startswith("Switch"))


def test_without_a_name_all_are_listed_by_size(capsys):
    lines = said(capsys, "count").splitlines()
    listed = lines[1 : lines.index("")]
    assert len(listed) == len(PRESETS)
    totals = [int(next(word for word in line.split() if word.count(",") > 1).replace(",", "")) for line in listed]
    assert totals == sorted(totals)
    assert all(name in lines[-2] for name in UNDISCLOSED)


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "vocab_size": 100,
}


@pytest.fixture
def write(tmp_path):
    def write(values: object, folder: str = "mine") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


def test_a_config_json_is_counted(write, capsys):
    path = write(MIXTRAL | {"memory_slots": 4, "tower": list(range(500))})
    text = said(capsys, "count", path)
    assert text.startswith("mine\n")
    assert f"As {path} " in text.replace("\n    ", " ")
    assert rows(text, "Parameters")["experts"] == [f"{3 * 5 * 3 * 32 * 48:,}", f"{3 * 2 * 3 * 32 * 48:,}"]
    assert "Not understood, and so not counted: memory_slots = 4" in text
    assert "Not understood, and so not counted: tower = [0, 1, 2," in text
    assert "499" not in text  # cut short


def test_files_of_one_name_are_told_apart(write, capsys):
    text = said(capsys, "count", write(MIXTRAL), write(MIXTRAL | {"vocab_size": 300}))
    assert "mine (2)" in text
    path, other = write(MIXTRAL, "a"), write(MIXTRAL | {"vocab_size": 300}, "b")
    assert rows(said(capsys, "count", path, other), "Parameters: all")["embedding"] == ["3,200", "9,600"]


def test_modules_beside_the_model_and_windows(write, capsys):
    values = MIXTRAL | {"sliding_window": 10}
    memory = rows(said(capsys, "count", write(values)), "Memory")
    assert memory["bf16 cache of 4,096 tokens, GB"] == memory["bf16 cache of 131,072 tokens, GB"]


@pytest.mark.parametrize("name", UNDISCLOSED)
def test_what_nobody_disclosed_is_not_counted(name, capsys):
    error = refused(capsys, "count", name.lower())
    assert error.startswith(f"{name} is undisclosed: ")
    assert error.endswith("There is nothing to count.\n")


def test_bad_input_to_count_is_a_sentence(write, tmp_path, monkeypatch, capsys):
    assert "did you mean 'Mixtral 8x22B'? Or give the path of a" in refused(capsys, "count", "mixtral 8x2b")
    assert "there is no such file" in refused(capsys, "count", str(tmp_path / "none.json"))
    assert "this is a folder; give" in refused(capsys, "count", str(tmp_path))
    assert "hidden_size=-1: expected a positive" in refused(capsys, "count", write(MIXTRAL | {"hidden_size": -1}))
    assert "it is no JSON (line 1, column " in refused(capsys, "count", write(json.dumps(MIXTRAL)[:50]))
    assert "--tokens 0: expected 1 to" in refused(capsys, "count", "t5-base", "--tokens", "0")
    assert "--batch -3: expected 1 to" in refused(capsys, "count", "t5-base", "--batch", "1", "-3")
    assert "Traceback" not in refused(capsys, "count", "t5-base", "gpt-4")


def test_a_released_model_is_meant_where_a_folder_has_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DeepSeek-V3").mkdir()
    assert "671,026,419,200" in said(capsys, "count", "DeepSeek-V3")


def test_counting_needs_no_torch():
    code = "import sys; from moe_lab.cli import main; main(['count', 'kimi-k2']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# --- moe-lab claims ---------------------------------------------------------------------------------------------------

LEDGER = """
sources:
  V3: {citation: A report, link: "https://example.org/v3"}
articles:
  S0: An article on costs
  S1: Another one
claims:
- id: S0.1
  claim: V3 has 473 billion parameters, and this sentence goes on for longer than a line of a terminal has columns.
  verdict: "false"
  value: It has 671 billion.
  why: Three matrices, not two.
  sources: [V3]
  computes:
  - {expression: count_parameters(V3).total, gives: 671026419200, within: 0, what: parameters}
- id: S0.2
  claim: V3 has more experts than Mixtral.
  verdict: "true"
  value: 256 against 8.
  why: So it is.
  sources: [V3]
  computes:
  - {expression: V3.moe.n_experts, gives: SHOULD_BE, within: 0, what: experts}
- id: S1.1
  claim: GPT-4 has a trillion parameters.
  verdict: undisclosed
  value: Nobody says.
  why: OpenAI withholds it.
  withheld: GPT-4
  sources: [V3]
  cited: The report withholds it.
"""


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Puts a small ledger in place of the course's; says what the second claim should give."""

    def use(should_be: int = 256, more: str = "") -> None:
        path = tmp_path / "claims.yaml"
        path.write_text(LEDGER.replace("SHOULD_BE", str(should_be)) + more)
        from moe_lab.claims import load_claims
        from moe_lab.commands import claims

        monkeypatch.setattr(claims, "load_claims", lambda: load_claims(path))
        monkeypatch.setenv("COLUMNS", "80")

    use()
    return use


OPEN = """- id: S1.2
  claim: Experts know more.
  verdict: roughly
  value: Open.
  why: To be measured.
  sources: [V3]
  open: "10"
"""


def test_claims_are_listed(ledger, capsys):
    text = said(capsys, "claims")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("S")] == ["S0.1", "S0.2", "S1.1"]
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("3 claims: 1 true, 1 false, 1 undisclosed.")


def test_claims_are_picked_out(ledger, capsys):
    assert said(capsys, "claims", "--verdict", "false").startswith("S0.1")
    assert said(capsys, "claims", "--article", "s1").startswith("S1.1")
    assert said(capsys, "claims", "--article", "S1", "--verdict", "true").strip().startswith("0 claims: none.")
    assert said(capsys, "claims", "--kind", "cited").splitlines()[-1].startswith("1 claim: 1 undisclosed.")


def test_what_is_open_is_counted_apart(ledger, capsys):
    ledger(more=OPEN)
    lines = said(capsys, "claims").splitlines()
    assert lines[-3].split() == ["S1.2", "open", "Experts", "know", "more.", "(leaning", "roughly)"]
    assert lines[-1].startswith("4 claims: 1 true, 1 false, 1 undisclosed, 1 open.")
    assert said(capsys, "claims", "--kind", "open").startswith("S1.2")
    assert said(capsys, "claims", "S1.2").startswith("S1.2 · open, leaning roughly · ")


def test_a_claim_in_full_is_worked_out_now(ledger, capsys):
    text = said(capsys, "claims", "s0.1", "S1.1")
    assert "671,026,419,200, as stated: parameters" in text
    assert "Three matrices, not two." in text
    assert "https://example.org/v3" in text
    assert "The report withholds it." in text


def test_a_ledger_that_is_wrong_fails(ledger, capsys):
    ledger(should_be=255)
    assert cli.main(["claims", "S0.2"]) == 1
    assert "256, NOT 255: experts" in capsys.readouterr().out
    ledger(should_be=256)
    assert cli.main(["claims", "S0.2"]) == 0


def test_unknown_claims_are_told_the_nearest(ledger, capsys):
    assert "The nearest are S0.1" in refused(capsys, "claims", "S0.11")
    assert refused(capsys, "claims", "--article", "S7") == "--article S7: expected one of S0, S1.\n"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["claims", "--verdict", "maybe"])
    assert stopped.value.code == 2


def test_the_course_has_claims_to_list(capsys):
    assert said(capsys, "claims").startswith("S0.1")
