"""The tables' maker, with scripts in place of train.py and evaluate.py; and whether the rows of its
tables are commands that the real ones accept."""
import re
import shlex
import time
from pathlib import Path

import pytest

import bench
import data
import evaluate
import metrics
import models
import train
from results import reproduce

FILE = Path(reproduce.__file__)

# Both take note of how they were called; GED is .1, .2, .3, .4 for "good", .1 more for "worse".
COMMON = """
import json, sys, time
from pathlib import Path
words = sys.argv[1:]
def value(option): return words[words.index(option) + 1]
def judged(folder, model, seed, more):
    folder.mkdir(exist_ok=True)
    geds = [0.1 * case + (model == "worse") * 0.1 + 0.02 * seed + more for case in (1, 2, 3, 4)]
    (folder / "per_case.csv").write_text("name,group,ged_16,dice\\n" + "".join(
        f"case{i},{i},{ged:.6g},{1 - ged:.6g}\\n" for i, ged in enumerate(geds)))
    summary = {"ged_16": {"mean": sum(geds) / 4, "stderr": 0.5, "n": 4},
               "mode_gap_16": {"mean": 0.25, "stderr": 0.125, "n": 4},
               "ged_4": {"mean": 0.5, "stderr": 0.5, "n": 4}}
    if model != "odd":
        summary["dice"] = {"mean": 1 - sum(geds) / 4, "stderr": 0.5, "n": 4}
    (folder / "metrics.json").write_text(json.dumps(summary))
"""
TRAIN = COMMON + """
model, seed = value("--model"), int(value("--seed"))
out = Path(value("--resume" if "--resume" in words else "--out"))
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls", "a") as calls:
    print(*words, file=calls)
settings = dict(data="shapes", model=model, seed=seed)
(out / "config.json").write_text(json.dumps(dict(
    settings=settings, parameters=1_500_000, training=dict(steps=40, batch_size=8))))
(out / "log.jsonl").write_text(json.dumps({"step": 20, "steps": 20, "seconds_per_step": 6}) + "\\n")
if model == "bad":
    print("error: the row is bad\\n")
    sys.exit(2)
if model == "slow" and "--resume" not in words:
    time.sleep(60)
judged(out, model, seed, 0.1)
"""
EVALUATE = COMMON + """
out = Path(words[0])
with open(out / "calls", "a") as calls:
    print(*words, file=calls)
settings = json.loads((out / "config.json").read_text())["settings"]
judged(out / "test-all-last", settings["model"], settings["seed"], 0.0)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function (rows, more arguments) -> (exit status, the Markdown), with the stand-ins."""
    for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE),
                       ("ssn.py", "print('3/9  2.0/s'); print('| a |'); print('low-rank: -0.7'); "
                        "open('toy.png', 'w')")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)

    def run(*rows, more=(), **fields):
        fields = dict(judge="--weights last", columns="ged_16 ncc_16 mode_gap_16 best:ged_16",
                      common="--data shapes --steps 40") | fields
        rows = {row: f"--model {row.split()[-1]}" for row in rows}
        table = reproduce.Table("Title", "Text.", rows, **fields)
        monkeypatch.setitem(reproduce.TABLES, "toy", table)
        status = reproduce.main(["toy", "--out", str(tmp_path / "out"), "--device", "cpu",
                                 "--jobs", "4", *more])
        return status, (tmp_path / "out" / "toy.md").read_text(encoding="utf-8")

    return run


def cells(text, row):
    """The cells of a row of the table."""
    line, = [line for line in text.splitlines() if line.startswith(f"| `{row}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def calls(tmp_path, run):
    return (tmp_path / "out" / "toy" / run / "calls").read_text().splitlines()


def test_table(made, tmp_path, capsys):
    status, text = made("worse", "good", more=("--seeds", "2"))
    assert status == 0 and text in capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("| "))
    assert header == ("|  | parameters | steps x batch | minutes | GED 16 | worst mode 16 "
                      "| best.pt: GED 16 | over seeds | p |")  # no run has ncc_16
    error = metrics.bootstrap([0.11, 0.21, 0.31, 0.41])["stderr"]  # of the cases' means over seeds
    assert cells(text, "good") == [
        "`good`", "1.50 M", "20 x 8", "2.0", f"0.260 ± {error:.3f}", "0.250 ± 0.125",
        f"0.360 ± {error:.3f}", f"± {0.02 / 2**0.5:.3f}", "best"]
    # all four cases are worse: of the 16 patterns of signs, 2 are as extreme
    assert cells(text, "worse")[4:] == [
        f"0.360 ± {error:.3f}", "0.250 ± 0.125", f"0.460 ± {error:.3f}", "± 0.014", "0.12"]
    assert "python train.py --model good --data shapes --steps 40\n" in text
    assert "python evaluate.py RUN --weights last\n" in text and "; runs at once: 4." in text
    assert "(toy-compare.png)" in text and (tmp_path / "out" / "toy-compare.png").exists()


@pytest.mark.parametrize("columns", ["dice ged_16", "ged_16 dice"])
def test_the_first_measure_ranks(made, columns):
    """Of Dice the highest is best, of the others the lowest."""
    _, text = made("worse", "good", columns=columns)
    assert [cells(text, row)[-1] for row in ("good", "worse")] == ["best", "0.12"]


def test_rows_of_a_kind_are_tested_among_themselves(made):
    _, text = made("a: good", "a: worse", "b: worse")
    assert [cells(text, row)[-1] for row in ("a: good", "a: worse", "b: worse")] == [
        "best", "0.12", ""]  # the last one has no rival


def test_pictures_are_of_the_checkpoint_that_the_table_is_of(made, tmp_path):
    _, text = made("good", "worse")
    compared = (tmp_path / "out" / "toy" / "good-0" / "compare.md").read_text(encoding="utf-8")
    assert f"| good-0 | {cells(text, 'good')[4][:5]} " in compared  # 0.1 less than best.pt's


def test_a_pooled_measure_has_no_test(made):
    """It has no value for a case, so nothing can be paired."""
    _, text = made("good", "worse", columns="mode_gap_16")
    assert cells(text, "worse")[-1] == "0.250 ± 0.125" and "| p |" not in text


def test_a_row_without_a_measure_has_an_empty_cell(made):
    _, text = made("good", "odd", columns="ged_16 dice")
    assert cells(text, "odd")[5] == "" and cells(text, "good")[5].startswith("0.750 ± ")


def test_a_finished_run_is_not_run_again(made, tmp_path):
    made("good")
    before = calls(tmp_path, "good-0")
    assert len(before) == 2 and "--out" in before[0] and before[1].endswith("last --device cpu")
    status, text = made("good", "worse")
    assert status == 0 and cells(text, "worse")
    assert calls(tmp_path, "good-0") == before
    made("good", more=("--steps", "80"))  # other commands: the run is resumed
    again = calls(tmp_path, "good-0")[2]
    assert "--resume" in again and "--steps 80" in again and "--steps 40" not in again


def test_a_failure_does_not_lose_the_others(made):
    status, text = made("good", "bad", "worse")
    assert status == 1
    assert cells(text, "good")[-1] == "best" and cells(text, "worse")[-1] == "0.12"
    assert "| `bad` |" not in text
    assert ("Failed: `python train.py --model bad --data shapes --steps 40 --seed 0 --out RUN`: "
            "error: the row is bad\n") in text


def test_interrupted_and_resumed(made, tmp_path, monkeypatch):
    """Ctrl-C while a run trains: it is stopped, the table holds the others, a rerun resumes it."""
    sleep, config = time.sleep, tmp_path / "out" / "toy" / "slow-0" / "log.jsonl"

    def interrupt(seconds):
        sleep(seconds)
        if config.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    start = time.monotonic()
    status, text = made("good", "slow", "worse", more=("--jobs", "1"))
    assert status == 1 and time.monotonic() - start < 30
    assert cells(text, "good") and "Not finished: slow-0, worse-0." in text
    monkeypatch.setattr(time, "sleep", sleep)
    assert made("good", "slow", "worse")[0] == 0
    assert ["--resume" in line for line in calls(tmp_path, "slow-0")] == [False, True, False]


def test_printed_table(made):
    """What commands print is the table, without the lines of their progress."""
    status, text = made(prints=("ssn.py",))
    assert status == 0
    assert "```sh\npython ssn.py\n```\n\n| a |\nlow-rank: -0.7\n" in text and "3/9" not in text
    assert "(toy-toy.png)" in text


def test_rows_without_their_data_are_left_out(made, tmp_path, capsys):
    made("good")
    options = dict(common="--data lidc --path FILE")
    assert made("good", **options)[0] == 2
    said = capsys.readouterr()
    assert "good needs --path FILE" in said.out and said.err.count("\n") == 1
    status, text = made("good", **options, more=("--path", "some/mini.pickle"))
    assert status == 0 and "--data lidc --path FILE\n" in text
    assert f"--path {Path('some/mini.pickle').resolve()} " in calls(tmp_path, "good-mini-0")[0]


def test_wrong_counts_are_refused():
    with pytest.raises(SystemExit):
        reproduce.main(["toy", "--jobs", "0"])


def test_fewer_steps_move_the_drops_of_the_learning_rate():
    assert (reproduce.with_steps("--lr 1e-3 --steps 3000 --batch-size 8 --lr-drops 2000:.3 2700:.1",
                                 1000)
            == "--lr 1e-3 --batch-size 8 --lr-drops 666:.3 900:.1 --steps 1000")
    assert reproduce.with_steps("--quick --data-args hide=50", 9).endswith("hide=50 --steps 9")


# ------------------------------------------------------------------------------- the real tables

ROWS = [(name, row) for name, table in reproduce.TABLES.items() for row in table.rows]


@pytest.mark.parametrize("name, row", ROWS)
def test_every_row_is_a_command(name, row):
    """train.py takes its options, the data set its own, and the model can be built."""
    table = reproduce.TABLES[name]
    args = train.parse(shlex.split(f"{table.rows[row]} {table.common}"))
    settings, _ = train.settle(args)
    source = data.DATASETS[settings["data"]]
    data._check_options(settings["data"], source, settings["data_args"])
    assert bool(source.layout) == (settings["path"] == "FILE")
    assert settings["annotators"] in ("all", "0")  # as every set has
    fields = models.MODELS[settings["model"]].QUICK_CONFIG if settings["quick"] else {}
    dims = dict(dims=3 if settings["data"] == "lesions3d" else 2)
    models.build(settings["model"], dims | fields | settings["model_args"], meta=True)
    if table.judge:
        evaluate.check(evaluate.parse(["RUN", *shlex.split(table.judge)]))


@pytest.mark.parametrize("name", [n for n, t in reproduce.TABLES.items() if t.prints])
def test_every_printed_command(name):
    for command in reproduce.TABLES[name].prints:
        script, *words = shlex.split(command)
        assert (FILE.parents[1] / script).is_file()
        if script == "bench.py":
            bench.parse(words)


def test_figures_beside_are_of_rows():
    for table in reproduce.TABLES.values():
        for published in table.beside.values():
            assert published.keys() <= table.rows.keys()


def test_no_text_has_a_name_in_braces():
    assert not [t.title for t in reproduce.TABLES.values() if "{" in t.title + t.text]


@pytest.mark.parametrize("name", [name for name, table in reproduce.TABLES.items() if table.rows])
def test_printed_commands_are_the_ones_that_run(name, tmp_path):
    """Once the shell has put the variable in."""
    args = reproduce.parse([name, "--path", "FILE", "--seeds", "1", "--out", str(tmp_path)])
    commands = [command for run in reproduce.plan(name, args) for command in run.commands]
    lines = reproduce.shell(commands)
    common = ""
    if lines[0].startswith("COMMON="):
        common = lines.pop(0).removeprefix('COMMON="').removesuffix('"')
        assert '"' not in common
    assert [line.replace("$COMMON", common) for line in lines] == [
        f"python {command}" for command in commands]


def test_every_table_is_listed_in_the_readme():
    text = FILE.with_name("README.md").read_text(encoding="utf-8")
    listed = text.partition("## The tables")[2].partition("<!--")[0]
    assert all(re.search(rf"`{name}[ `]", listed) for name in reproduce.TABLES)
    for name in re.findall("<!-- results/reproduce.py (.*) -->", text):
        assert f"-->\n## {reproduce.TABLES[name].title}\n" in text
