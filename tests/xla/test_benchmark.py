"""The suite `xla` on steps so small that its figures mean nothing."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from benchmarks import report, tables, xla
from benchmarks.runner import Refusal

RUN = report.Run("a machine", "versions", "2026-01-01T00:00:00+00:00")


def names(**options):
    return [case.name for case in xla.cases(threads=[1], dtypes=["float32"], **options)]


def test_full_adds_the_large_network_and_accuracy():
    some, everything = names(), names(full=True)
    assert set(some) < set(everything)
    added = set(everything) - set(some)
    assert added == {f"step/R152x4/{name}" for name in xla.TOPOLOGIES} | {"accuracy/fashion-mnist"}
    assert len(names(quick=True)) == 3 and names(device="cuda") == []


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu isn't here")
def test_a_step_has_its_figures_table_and_picture(tmp_path):
    found = list(xla._step_figures("R14x0.5", "v2:2x2"))
    assert not any(isinstance(figure, Refusal) for figure in found)
    metrics = {(figure.provider, figure.metric) for figure in found}
    for provider in ("plain", "bit"):
        assert {(provider, "cycles_m"), (provider, "peak_gib")} <= metrics
        assert (provider, "summed_f32_gb") in metrics
    assert ("plain", "summed_bf16_gb") in metrics and ("bit", "summed_bf16_gb") not in metrics
    case = xla._count("step/R14x0.5/v2:2x2", "bfloat16", lambda: found)
    path = tmp_path / "xla.csv"
    report.CsvFile(path).append([report.row(case, figure, RUN) for figure in found])
    rows = tables.read(path)
    assert "cycles_over_plain" in xla.markdown(rows)
    xla.draw(rows, tmp_path / "xla.png")
    assert (tmp_path / "xla.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_does_not_fit_is_a_refusal(monkeypatch):
    said = SimpleNamespace(returncode=1, stderr="noise\ndoes not fit: 2.00 GiB of 1.00\n")
    monkeypatch.setattr(xla.subprocess, "run", lambda *a, **k: said)
    refusals = list(xla._step_figures("R152x4", "v2:2x2"))
    assert [(r.provider, r.red) for r in refusals] == [("plain", False), ("bit", True)]
    assert refusals[0].reason == "does not fit: 2.00 GiB of 1.00"
    said.returncode, said.stderr = -9, ""
    broken = next(xla._step_figures("R152x4", "v2:2x2"))
    assert broken.red and "exit code -9" in broken.reason


def test_the_process_of_a_step_says_why_it_has_none(monkeypatch, capsys):
    def refuse(model, name, provider):
        raise xla.plan.TooLarge(xla.plan.Question(name, model, 10, 8), 2 * xla.GiB, xla.GiB)

    monkeypatch.setattr(xla, "compiled_step", refuse)
    assert xla.main("R152x4", "v2:2x2", "bit") == 1
    assert capsys.readouterr().err == "does not fit: 2.00 GiB of 1.00\n"
