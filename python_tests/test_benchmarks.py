"""The benchmarks run, and their parts compute what they say. What they measure is nobody's test: machines are noisy."""

import csv
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import attention_bench
import attention_measure
import attention_settings as cases
import cuda_timing
import pytest
import timing
import torch
from attention_report import Row, plot, table, write_csv
from attention_targets import target_table, targets
from peak_memory import fresh_process
from two_blocks import peak_of_two_blocks

from sabmn_ext.ops import dispatch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
COMMANDS = {
    "data_bench.py": ["--size", "32x16", "--batch", "16", "--workers", "0", "--rounds", "1"],
    "train_bench.py": ["--size", "64x32", "--batch", "2", "--backbone", "resnet18", "--rounds", "1"],
    "attention_bench.py": ["--shapes", "2x16x5x3:4", "--rounds", "1", "--seconds", "0"],
    "batch_norm_bench.py": ["--size", "64", "32", "--batch", "2", "--rounds", "1"],
    "convolution_bench.py": ["--size", "64", "32", "--batch", "2", "--rounds", "1", "--dtypes", "fp32", "bf16"],
    "spectral_norm_bench.py": ["--rounds", "1"],
    "rerank_bench.py": ["--scale", "0.02", "--dim", "64", "--rounds", "1"],
    "retrieval_bench.py": ["--queries", "40", "--gallery", "500", "--dim", "64", "--rounds", "1"],
}
SMALL = cases.Shape("2x16x5x3:4", 2, 16, 5, 3, 4)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def setting(shape: cases.Shape = SMALL, **changes: object) -> cases.Setting:
    return cases.Setting(shape, "contiguous", 1, "cpu", "paper", "auto")._replace(**changes)


@pytest.mark.parametrize("script", COMMANDS)
def test_benchmark_runs(script: str) -> None:
    command = [sys.executable, str(FOLDER / script), *COMMANDS[script]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ours" in result.stdout


def test_every_benchmark_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*_bench.py")} == set(COMMANDS)


# ---- timing ----


def test_candidates_take_turns() -> None:
    ran: list[str] = []
    median = timing.interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 4)
    assert median.keys() == {"a", "b"}
    assert all(set(ran[i : i + 2]) == {"a", "b"} for i in range(0, 10, 2)), "one warm-up and four rounds, each of both"
    assert len(ran) == 10


def test_rounds_go_on_until_the_time_is_spent() -> None:
    times = timing.timed({"a": lambda: None}, 2, seconds=0.05)["a"]
    assert len(times) > 2
    assert min(times) > 0
    assert len(timing.timed({"a": lambda: None}, 2, limit=0)["a"]) == 2
    assert len(timing.timed({"a": lambda: None}, 9, limit=0)["a"]) == timing.MIN_ROUNDS
    assert len(timing.timed({"a": lambda: time.sleep(0.01)}, 99, seconds=99, limit=0.1)["a"]) in range(3, 11)
    assert len(timing.timed({"a": lambda: None}, 2, clock=lambda run: 7.0)["a"]) == 2
    assert timing.timed({"a": lambda: None}, 3, clock=lambda run: 7.0)["a"] == [7.0] * 3


@pytest.mark.parametrize(("set_bytes", "cache"), [(1 << 20, 50 << 20), (30 << 20, 50 << 20), (1 << 30, 50 << 20)])
def test_a_set_of_inputs_comes_back_after_twice_the_cache(set_bytes: int, cache: int) -> None:
    sets = cuda_timing.sets_past_cache(set_bytes, cache)
    assert (sets - 1) * set_bytes >= 2 * cache
    assert (sets - 2) * set_bytes < 2 * cache, "no more than that"
    assert cuda_timing.sets_past_cache(1, cache) == cuda_timing.sets_past_cache(0, cache) == cuda_timing.MAX_SETS


def test_rotation_uses_every_set_equally_often() -> None:
    assert cuda_timing.rotation([1, 2, 3], 5) == [1, 2, 3, 1, 2, 3]
    assert cuda_timing.rotation([1, 2, 3], 3) == [1, 2, 3]
    assert cuda_timing.rotation([1, 2, 3], 1) == [1, 2, 3]
    assert len(cuda_timing.rotation([1])) == cuda_timing.CALLS


class FakeGraph:
    """Counts its replays; what is captured into it simply runs."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeContext:
    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class FakeEvent:
    """Two events, recorded a quarter of a second apart."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 250.0
        self.time = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.time - self.time


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as far as the benchmark calls it, with the tensors on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": FakeContext,
        "CUDAGraph": FakeGraph,
        "graph": FakeContext,
        "Event": FakeEvent,
        "synchronize": lambda: None,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
        "get_device_name": lambda: "pretended GPU",
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 3000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(attention_measure, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(attention_measure, "MM_SIZE", 16)

    def on_cpu(function: object) -> object:
        return lambda *args, **kwargs: function(*args, **(kwargs | ({"device": "cpu"} if "device" in kwargs else {})))

    monkeypatch.setattr(torch, "empty", on_cpu(torch.empty))
    monkeypatch.setattr(timing.torch, "randn", on_cpu(torch.randn))
    draw = cases.draw
    monkeypatch.setattr(attention_measure, "draw", lambda s, *rest: draw(s._replace(device="cpu"), *rest))


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("launch", [[], ["--no-graph"]])
def test_the_gpu_path(launch: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Graphs, events, rotation and both ceilings, on a pretended GPU: the way through the program, not a GPU's."""
    arguments = ["--device", "cuda", "--shapes", "2x16x5x3:4", "--rivals", "eager", "sdpa-math", "sdpa-cudnn"]
    arguments += ["--rounds", "2", "--seconds", "0", "--csv", str(tmp_path / "out.csv"), *launch]
    attention_bench.main(arguments)
    printed = capsys.readouterr()
    assert ("call by call" if launch else "CUDA graphs") in printed.out
    assert "of copy" in printed.out
    assert "sdpa-cudnn is left out in fp32" in printed.err
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["candidate"] for row in rows] == ["ours", "eager", "sdpa-math"] * 2
    calls = len(cuda_timing.rotation(range(cuda_timing.sets_past_cache(2 * 4 * SMALL.elements, 4096))))
    for row in rows:
        assert float(row["milliseconds"]) == pytest.approx(250 / calls), "the graph's time, shared by its calls"
        bytes_ = 4 * SMALL.elements * (2 if row["pass_"] == cases.FORWARD else 5)
        copy_rate = (1 << 10) / (0.25 / cuda_timing.CALLS)
        assert float(row["share_of_copy"]) == pytest.approx(bytes_ / copy_rate / (0.25 / calls))
        assert row["peak_bytes"] == "2000"


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("name", ["eager", "ours"])
def test_a_rival_that_the_gpu_has_no_memory_for(name: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    captured = cuda_timing.captured

    def out_of_memory(calls: list[object]) -> object:
        owner = {"Eager": "eager", "SelfAttention2d": "ours"}.get(type(getattr(calls[0], "args", [0])[0]).__name__)
        if owner == name:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return captured(calls)

    monkeypatch.setattr(cuda_timing, "captured", out_of_memory)
    arguments = ["--device", "cuda", "--shapes", "2x16x5x3:4", "--rivals", "eager", "sdpa-math", "--rounds", "1"]
    if name == "ours":
        with pytest.raises(torch.OutOfMemoryError):
            attention_bench.main([*arguments, "--seconds", "0"])
        return
    attention_bench.main([*arguments, "--seconds", "0"])
    printed = capsys.readouterr()
    assert printed.err.count("  eager is left out in fp32: CUDA out of memory.\n") == 2
    assert "sdpa-math" in printed.out
    assert "eager" not in printed.out


@pytest.mark.usefixtures("pretended_gpu")
def test_a_graph_holds_every_call_once_after_the_warm_up() -> None:
    ran: list[int] = []
    replay = cuda_timing.captured([lambda i=i: ran.append(i) for i in range(3)])
    assert ran == [0, 0, 0, 0, 1, 2]
    assert replay.__self__.replays == 0
    assert cuda_timing.device_clock(replay) == 0.25
    assert replay.__self__.replays == 1


# ---- shapes, operations, bytes ----


def test_shapes() -> None:
    assert cases.parse_shape("stage3", 32) == ("stage3", 32, 1024, 16, 8, 128)
    assert cases.parse_shape("4x512x7x5", 32) == ("4x512x7x5", 4, 512, 7, 5, 64)
    assert cases.parse_shape("2x16x5x3:4", 32) == SMALL
    assert (SMALL.positions, SMALL.elements) == (15, 480)


def test_operations_are_those_of_the_products() -> None:
    """Against torch's own counter, which sees convolutions and batched products; the rest is not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    for form in ("paper", "gan"):
        case = cases.draw(setting(form=form), "fp32")
        eager = cases.candidate("eager", case.block)
        for pass_ in cases.PASSES:
            with FlopCounterMode(display=False) as counter:
                y = eager(case.inputs[0][0])
                if pass_ == cases.TRAINING:
                    y.backward(case.inputs[0][1])
            assert counter.get_total_flops() == cases.operations(SMALL, form, pass_)
    n, c, d = 2048, 256, 32
    assert cases.operations(cases.parse_shape("stage1", 64), "paper", cases.TRAINING) == (
        3 * 2 * 64 * n * (4 * c * d + 2 * n * d)
    )


def test_floor_bytes() -> None:
    stage1 = cases.parse_shape("stage1", 64)
    assert round(cases.floor_bytes(stage1, cases.FORWARD, "bf16") / 1e6) == 134
    assert cases.floor_bytes(SMALL, cases.TRAINING, "fp64") == 5 * 8 * 480


# ---- cases and agreement ----


@pytest.mark.parametrize("memory_format", cases.FORMATS)
@pytest.mark.parametrize("form", ["paper", "gan"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rivals_agree(dtype: str, form: str, memory_format: str) -> None:
    case = cases.draw(setting(form=form, memory_format=memory_format), dtype, sets=2)
    assert 0.5 <= abs(case.block.gamma.item()) <= 2
    (x, grad_y), (other, _) = case.inputs
    assert x.is_contiguous(memory_format=cases.FORMATS[memory_format])
    assert x.dtype == grad_y.dtype == cases.DTYPES[dtype]
    assert not torch.equal(x, other)
    for name in ("eager", "sdpa-math"):
        module = cases.candidate(name, case.block)
        assert 0 < cases.check_agreement(case, module, dtype, name) < cases.tolerance(dtype)


def test_flash_agrees_and_says_where_it_cannot() -> None:
    case = cases.draw(setting(), "fp32")
    assert cases.check_agreement(case, cases.candidate("sdpa-flash", case.block), "fp32", "sdpa-flash") < 1e-5
    gan = cases.draw(setting(form="gan"), "fp32")
    with pytest.raises(RuntimeError, match="No available kernel"):
        cases.check_agreement(gan, cases.candidate("sdpa-flash", gan.block), "fp32", "sdpa-flash")


@pytest.mark.parametrize("parameter", ["query.weight", "value.weight", "out.weight", "gamma"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_rival_is_found(dtype: str, parameter: str) -> None:
    case = cases.draw(setting(), dtype)
    rival = cases.candidate("eager", case.block)
    with torch.no_grad():
        rival.block.get_parameter(parameter).mul_(1.5)
    with pytest.raises(AssertionError, match=rf"eager and ours disagree in {dtype}: .* differs by"):
        cases.check_agreement(case, rival, dtype, "eager")


def test_a_rival_that_is_not_a_number_is_found() -> None:
    case = cases.draw(setting(), "fp32")
    rival = cases.candidate("eager", case.block)
    with torch.no_grad():
        rival.block.gamma.fill_(float("nan"))
    with pytest.raises(AssertionError, match="differs by nan"):
        cases.check_agreement(case, rival, "fp32", "eager")


def test_the_tolerance_follows_the_precision_of_products() -> None:
    try:
        found = []
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            found.append((cases.tolerance("fp32"), cases.tolerance("bf16")))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [fp32 for fp32, _ in found] == pytest.approx([2**-11.5, 2**-5, 2**-3.5])
    assert [bf16 for _, bf16 in found] == pytest.approx([2**-3.5] * 3)


def test_the_same_case_every_time() -> None:
    one, two = (cases.draw(setting(), "fp32") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.inputs[0], two.inputs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.block.parameters(), two.block.parameters(), strict=True))


@pytest.mark.parametrize("form", ["paper", "gan"])
def test_logits_of_a_given_size(form: str) -> None:
    case = cases.draw(setting(form=form, logits=30.0), "fp32")
    query, key = (layer(case.inputs[0][0]).flatten(2) for layer in (case.block.query, case.block.key))
    assert (query[0].mT @ key[0]).std().item() == pytest.approx(30, rel=1e-5)
    cases.check_agreement(case, cases.candidate("eager", case.block), "fp32", "eager")


def test_the_backend_is_the_recorded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.draw(setting(backend="torch"), "fp32")
    for pass_ in cases.PASSES:
        assert cases.backend_that_ran(case, pass_, "torch") == "torch"
        assert cases.backend_that_ran(case, pass_, "auto") == "torch"
        with pytest.raises(AssertionError, match=r"expected .* on one backend, cpu"):
            cases.backend_that_ran(case, pass_, "cpu")
    choose = dispatch.choose

    def backward_elsewhere(operation: str, backend: str | None, *rest: object) -> str:
        return choose(operation, "torch" if operation == "attention_backward" else backend, *rest)

    auto = cases.draw(setting(), "fp32")
    if cases.backend_that_ran(auto, cases.TRAINING, "auto") != "torch":
        monkeypatch.setattr(dispatch, "choose", backward_elsewhere)
        with pytest.raises(AssertionError, match="on one backend"):
            cases.backend_that_ran(auto, cases.TRAINING, "auto")


# ---- memory ----


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_is_that_of_the_blocks() -> None:
    with fresh_process() as process:
        for megabytes in (40, 8, 200, 8):
            peak = process.submit(peak_of_two_blocks, megabytes).result()
            assert peak == pytest.approx(megabytes << 20, abs=2 << 20)


# ---- table, CSV, plot ----


def row(**changes: object) -> Row:
    """Ours at stage 1, unless said."""
    values = {
        "shape": "stage1", "batch": 4, "channels": 256, "height": 64, "width": 32, "reduced": 32, "form": "paper",
        "memory_format": "contiguous", "device": "cpu", "threads": 1, "dtype": "fp32", "pass_": cases.FORWARD,
        "candidate": "ours", "backend": "cpu", "rounds": 15, "milliseconds": 10.0, "lower_quartile_ms": 9.0,
        "upper_quartile_ms": 11.5, "gflops": 268.4, "mm_gflops": 300.0, "share_of_mm": 0.895, "share_of_copy": None,
        "times_ours": None, "peak_bytes": 25_300_000,
    }  # fmt: skip
    return Row(**(values | changes))


def rival(name: str, milliseconds: float, **changes: object) -> Row:
    return row(candidate=name, backend=None, milliseconds=milliseconds, times_ours=milliseconds / 10, **changes)


def test_table() -> None:
    rows = [row(), rival("eager", 50.0), rival("sdpa-flash", 12.5, pass_=cases.TRAINING, peak_bytes=None)]
    lines = table(rows).splitlines()
    assert lines[0] == "stage1: B 4, C 256, 64×32, d 32, contiguous, 1 thread"
    assert " ".join(lines[1].split()) == "pass dtype candidate backend rounds ms ± % GF/s of mm / ours peak MB"
    assert lines[2].split() == ["forward", "fp32", "ours", "cpu", "15", "10.000", "12", "268.4", "0.90", "25.3"]
    assert lines[3].split() == ["eager", "15", "50.000", "2", "268.4", "0.90", "5.00", "25.3"], "the pass is named once"
    assert " ".join(lines[4].split()) == "forward + backward fp32 sdpa-flash 15 12.500 10 268.4 0.90 1.25"
    assert len(lines[1]) == len(lines[2]) == len(lines[3]), "columns stand below each other"
    with_copy = table([row(share_of_copy=0.5, peak_bytes=None), rival("eager", 5000.0, peak_bytes=None)]).splitlines()
    assert " ".join(with_copy[1].split()) == "pass dtype candidate backend rounds ms ± % GF/s of mm of copy / ours"
    assert with_copy[2].index("0.50") + 4 == with_copy[1].index("of copy") + 7, "numbers end where their heading ends"
    assert len(with_copy[1]) == len(with_copy[3])


def test_csv(tmp_path: Path) -> None:
    write_csv([row(), rival("eager", 50.0)], tmp_path / "out.csv")
    ours, eager = csv.DictReader((tmp_path / "out.csv").open())
    assert (ours["candidate"], ours["backend"], ours["times_ours"], ours["peak_bytes"]) == (
        "ours",
        "cpu",
        "",
        "25300000",
    )
    assert float(eager["times_ours"]) == 5.0
    assert float(eager["upper_quartile_ms"]) == 11.5


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(), rival("eager", 50.0), rival("sdpa-flash", 12.5, shape="2x16x5x3", dtype="bf16", threads=2)]
    plot(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# ---- targets ----


def measured_targets(**milliseconds: float) -> dict[tuple[str, str], tuple[float | None, bool | None]]:
    times = {"ours": 10.0, "eager": 50.0, "sdpa_math": 60.0, "sdpa_flash": 11.0, "bf16": 6.0} | milliseconds
    rows = []
    for pass_ in cases.PASSES:
        rows.append(row(pass_=pass_, milliseconds=times["ours"], peak_bytes=25))
        for name in ("eager", "sdpa_math", "sdpa_flash"):
            other = rival(name.replace("_", "-"), times[name], pass_=pass_, peak_bytes=251)
            rows.append(replace(other, times_ours=times[name] / times["ours"]))
        rows.append(row(pass_=pass_, dtype="bf16", milliseconds=times["bf16"], share_of_mm=0.1))
    rows.append(row(memory_format="channels_last", milliseconds=1.0))
    return {(t.pass_, t.what.split(", ")[1].split(" as ")[0]): (t.measured, t.met) for t in targets(rows)}


def test_targets() -> None:
    found = measured_targets()
    assert len(found) == 8, "three of each pass, bf16 of the forward, memory of the training pass"
    assert found[cases.FORWARD, "share of torch's 2048³ product"] == (0.895, True)
    assert found[cases.FORWARD, "times faster than eager"] == (5.0, True)
    assert found[cases.TRAINING, "times faster than the best SDPA"] == (pytest.approx(1.1), True)
    assert found[cases.FORWARD, "times faster than our own fp32"] == (pytest.approx(10 / 6), True)
    assert found[cases.TRAINING, "peak memory"] == (pytest.approx(25 / 251), True)


@pytest.mark.parametrize(
    ("times", "what"),
    [
        ({"eager": 39.0}, "times faster than eager"),
        ({"sdpa_flash": 9.9}, "times faster than the best SDPA"),
        ({"bf16": 7.0}, "times faster than our own fp32"),
    ],
)
def test_a_target_that_is_missed(times: dict[str, float], what: str) -> None:
    found = measured_targets(**times)
    assert [key for key, (_, met) in found.items() if not met] == [(cases.FORWARD, what)] or what.endswith("SDPA")
    assert found[cases.FORWARD, what][1] is False


def test_targets_that_were_not_measured_and_their_table() -> None:
    found = targets([row(peak_bytes=None), row(shape="2x16x5x3"), row(pass_=cases.TRAINING, share_of_mm=0.6)])
    assert [t.met for t in found] == [True, None, None, None, False, None, None, None]
    text = target_table(found)
    assert "≥ 0.80     0.895 met" in text
    assert "≥ 0.70     0.600 not met" in text
    assert "≤ 0.10   not run" in text
    assert text.endswith("1 of 8 targets met, 1 not met, 6 not run")


# ---- the command line ----


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attention_measure, "MM_SIZE", 64)
    paths = {name: tmp_path / f"out.{name}" for name in ("csv", "json")}
    arguments = ["--shapes", "2x16x5x3:4", "1x32x1x7", "--dtypes", "fp32", "bf16", "--formats", "channels_last"]
    arguments += ["--rivals", "eager", "sdpa-flash", "--threads", "1", "2", "--rounds", "2", "--seconds", "0"]
    arguments += ["--no-memory", "--csv", str(paths["csv"]), "--profile", str(paths["json"])]
    attention_bench.main(arguments)
    printed = capsys.readouterr()
    rows = list(csv.DictReader(paths["csv"].open()))
    assert len(rows) == 2 * 2 * 2 * 2 * 3, "threads, shapes, passes, dtypes, candidates"
    assert {row["threads"] for row in rows} == {"1", "2"}
    where = ("attention_forward", "cpu", torch.device("cpu"))
    why_not = {dtype: dispatch.why_not(*where, cases.DTYPES[dtype]) for dtype in ("fp32", "bf16")}
    expected = {dtype: "torch" if reason else "cpu" for dtype, reason in why_not.items()}
    assert all(row["backend"] == (expected[row["dtype"]] if row["candidate"] == "ours" else "") for row in rows)
    assert all(float(row["milliseconds"]) > 0 and row["rounds"] == "2" for row in rows)
    assert all(
        float(row["share_of_mm"]) == pytest.approx(float(row["gflops"]) / float(row["mm_gflops"])) for row in rows
    )
    assert "[4/4" in printed.err
    assert "eager agrees with ours in bf16" in printed.err
    events = json.loads(paths["json"].read_text())["traceEvents"]
    labels = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert "2x16x5x3:4 channels_last 2 threads: forward + backward bf16 ours" in labels
    assert len(labels) == len(rows) + 1, "each candidate's, and the warm-up's"


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ([], 80),
        (["--dtypes", "fp32", "bf16", "--threads", "1", "2", "--shapes", "stage1"], 80),
        (["--rounds", "15"], float("inf")),
        (["--targets"], float("inf")),
        (["--targets", "--limit", "60"], 60),
    ],
)
def test_time_limit(arguments: list[str], limit: float) -> None:
    assert attention_bench.parse(["--device", "cpu", *arguments]).limit == limit
    assert attention_bench.parse(["--device", "cpu", *arguments]).rounds == 15


def test_rounds_are_given_up_for_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention_measure, "MM_SIZE", 64)
    arguments = ["--shapes", "2x16x5x3:4", "--rivals", "eager", "--no-memory", "--csv", str(tmp_path / "out.csv")]
    attention_bench.main(["--device", "cpu", *arguments, "--limit", "0"])
    assert {row["rounds"] for row in csv.DictReader((tmp_path / "out.csv").open())} == {str(timing.MIN_ROUNDS)}


def test_targets_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--targets", "--shapes", "stage3", "--batch", "1", "--threads", "1", "--rounds", "1", "--seconds", "0"]
    attention_bench.main([*arguments, "--rivals", "eager", "--dtypes", "fp32", "bf16"])
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("stage3 ")]
    assert len(found) == 7
    assert sum("not run" in line for line in found) == 2, "no SDPA, in either pass"
    assert not any("bf16  eager" in line for line in lines), "bf16 is held against our own fp32 alone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "stage5"], "shape 'stage5' is unknown; expected stage1, stage2, stage3, stage4 or BxCxHxW[:d]"),
        (["--shapes", "4x16x4x4:3"], "shape '4x16x4x4:3' cannot be; expected .* a d that divides C"),
        (["--shapes", "4x4x4x4"], "shape '4x4x4x4' cannot be"),
        (["--dtypes", "int8"], "argument --dtypes: invalid choice: 'int8'"),
        (["--rivals", "sdpa-cudnn"], "rival 'sdpa-cudnn' is not there on cpu; expected some of eager, sdpa-math"),
        (["--threads", "0"], "--threads is 0; expected at least 1"),
        (["--rounds", "-1"], "--rounds is -1; expected at least 1"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--logits", "-3"], "--logits is -3.0; expected a standard deviation above 0"),
        (["--csv", "nowhere/out.csv"], "'nowhere/out.csv' cannot be written: there is no folder 'nowhere'"),
        (["--plot", "out.mp4"], "--plot is 'out.mp4'; expected a name that ends in .png, .pdf, .svg"),
        (["--device", "cuda"], "--device is cuda, but torch finds no CUDA device here"),
        (["--stages", "1"], "unrecognized arguments: --stages 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        attention_bench.main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, "one line"
    assert message.split(".*")[0] in printed
    assert message.split(".*")[-1] in printed


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit):
        attention_bench.main(["--plot", "out.png"])
    assert "--plot needs matplotlib, which is not installed; run: pip install matplotlib" in capsys.readouterr().err


def test_targets_are_of_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        attention_bench.main(["--targets"])
    assert "--targets are those of a CPU; expected --device cpu" in capsys.readouterr().err
