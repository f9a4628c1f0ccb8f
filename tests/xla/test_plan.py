"""What a TPU's compiler says of a training step, on machines without a TPU."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import xla
from bit import plan as command
from bit.xla import plan, program, topology

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu isn't here")
SMALL = ["--topology", "v2:2x2", "--model", "R14x0.125", "--classes", "10", "--size", "64"]


@pytest.fixture(scope="module")
def r50x1():
    """R50x1's step on 512 cores of v3, as in the paper's runs, plain and ours."""
    return {name: xla.compiled_step("R50x1", "v3:16x16", name) for name in ("plain", "bit")}


@needs_libtpu
def test_r50x1_on_v3_512_costs_less_than_a_plain_step(r50x1):
    plain, ours = r50x1["plain"], r50x1["bit"]
    assert 20e6 < plain.total_cycles < 25e6  # no weaker a rival than it was
    assert ours.total_cycles <= 0.80 * plain.total_cycles
    assert ours.peak <= 0.90 * plain.peak
    assert ours.peak < topology.DEVICES["v3"].memory


@needs_libtpu
def test_gradients_are_summed_in_float32(r50x1):
    """All of R50x1's 68 million, where the plain step sums those of convolutions in bfloat16."""
    parameters = 68_256_659
    assert r50x1["bit"].summed_in.keys() == {"f32"}
    assert r50x1["bit"].summed_in["f32"] >= 4 * parameters
    assert r50x1["plain"].summed_in["bf16"] > 2 * 20e6


@needs_libtpu
def test_command_prints_all_of_it_and_draws(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = [*SMALL, "--recipe", "bit_s", "--picture", str(picture)]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    for words in (
        "R14x0.125, 10 classes",
        "on 8 devices of v2:2x2",
        "512 images a device",  # 4096 over 8
        "GiB a device of 7.48",
        "million a step, estimated by the compiler",
        *program.KINDS,
        "matrix floor",
        "memory floor",
        "summed",
        "in f32",
        "BiT-S: 1,281,167 images, 90 epochs, 28,151 updates of 4096:",
    ):
        assert words in said, words
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_libtpu
def test_json_has_numbers_that_agree(capsys):
    assert command.main([*SMALL, "--batch", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["devices"] == 8 and found["batch"] == 4
    cycles = dict(found["cycles"])
    assert cycles.pop("total") == sum(cycles.values()) > 0
    assert 0 < found["memory"]["peak"] < found["memory"]["limit"]
    assert found["step_s"] == pytest.approx(found["cycles"]["total"] / 0.7e9)
    moved = {"sum": 0, "gather": 0}
    for one in found["collectives"]:
        assert one["dtype"] == {"sum": "f32", "gather": "bf16"}[one["what"]]
        moved[one["what"]] += one["nbytes"]
    # A loss and the sums of standardization beside; a few kernels aren't spread.
    assert 1 <= moved["sum"] / (4 * found["parameters"]) < 1.2
    assert 0.9 < moved["gather"] / (2 * found["parameters"]) <= 1


@needs_libtpu
def test_no_network_is_asked():
    """In a network namespace of its own, which has none."""
    here = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*here, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    ask = [sys.executable, "-m", "bit.plan", *SMALL, "--batch", "1", "--json"]
    done = subprocess.run([*here, *ask], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["fits"], done.stderr


@needs_libtpu
def test_what_does_not_fit_says_by_how_much_and_what_would(capsys):
    """Weights and momenta of a large head, which fit where each device has an eighth."""
    arguments = [*SMALL[:4], "--classes", "2000000", "--size", "64", "--batch", "1"]
    assert command.main([*arguments, "--no-sharded"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("R14x0.125 does not fit v2:2x2: 1 image a device, weights and")
    assert "GiB of 7.48, " in first and first.endswith("too much")
    assert second.startswith("would fit: 1 image a device, weights and momenta spread, 5.")


@pytest.mark.parametrize(
    "said, needed, limit",
    [
        (
            "the total memory required for HLO temporaries (8.63G) exceeds available HBM (7.48G)",
            8.63,
            7.48,
        ),
        ("Ran out of memory in memory space hbm. Used 17.21G of 15.48G hbm.", 17.21, 15.48),
        ("Used 512.00M of 0.25G hbm", 0.5, 0.25),
    ],
)
def test_refusals_of_the_compiler_are_read(said, needed, limit):
    def compile():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    question = plan.Question("v3:16x16", "R50x1", 10, 8)
    with pytest.raises(plan.TooLarge) as caught:
        plan.compile_or_refuse(SimpleNamespace(compile=compile), question)
    assert caught.value.needed == pytest.approx(needed * 2**30)
    assert caught.value.limit == pytest.approx(limit * 2**30)


def test_choices_are_tried_from_the_nearest(monkeypatch):
    asked = []

    def answer(question):
        asked.append((question.sharded, question.remat, question.batch))
        if question.batch > 2:
            raise plan.TooLarge(question, 2, 1)
        return question

    monkeypatch.setattr(plan, "answer", answer)
    question = plan.Question("v3:16x16", "R50x1", 10, 8, sharded=False)
    assert plan.what_fits(question).batch == 2
    assert asked == [(True, False, 8), (True, True, 8), (True, True, 4), (True, True, 2)]
    monkeypatch.setattr(plan, "answer", lambda q: (_ for _ in ()).throw(plan.TooLarge(q, 2, 1)))
    assert plan.what_fits(replace(question, batch=1)) is None


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--topology", "v9:1x1"], "topology is 'v9:1x1'; it must be like v2:2x2"),
        (["--topology", "v2:2x2", "--batch", "0"], "batch is 0; it must be at least 1"),
        (["--topology", "v2:3x7x9"], "topology is 'v2:3x7x9', which libtpu doesn't know"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
@needs_libtpu
def test_wrong_arguments_are_one_line_and_2(arguments, expected, capsys):
    assert command.main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("package", ["libtpu", "jax"])
def test_without_a_package_the_command_says_what_to_install(package, monkeypatch, capsys):
    def found(name, *rest):
        return None if name == package else find_spec(name, *rest)

    monkeypatch.setattr("bit.packages.find_spec", found)
    monkeypatch.setattr("bit.xla.topology.find_spec", found)
    assert command.main(["--topology", "v3:2x2"]) == 2
    said = capsys.readouterr().err
    assert package in said and "pip install 'bit-kernels[tpu]'" in said


# A program of two devices, as the compiler writes it: a loop of 3 rounds, a fusion that multiplies,
# sums in two types, and a gather that is compiled as a sum.
HLO = """HloModule jit_step, is_scheduled=true

%multiplies (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%norms (a: f32[8,8]) -> f32[8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %r = f32[8]{0} reduce(%a), metadata={op_name="jit(step)/group_norm_relu/reduce_sum"}
}

%body (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %f = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%multiplies, backend_config={"estimated_cycles":"100"}
}

%condition (x: f32[8,8]) -> pred[] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %p = pred[] constant(true)
}

%begins (a: bf16[8]) -> bf16[64] {
  %a = bf16[8]{0} parameter(0)
  %g = bf16[64]{0} all-gather(%a), replica_groups=[1,8]<=[8]
  ROOT %c = bf16[64]{0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%goes_on (a: bf16[64]) -> bf16[64] {
  %a = bf16[64]{0} parameter(0)
  %g = bf16[64]{0} all-gather(%a), replica_groups=[1,8]<=[8]
  ROOT %c = bf16[64]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %n = f32[8]{0} fusion(%w), kind=kLoop, calls=%norms, backend_config={"estimated_cycles":"7"}
  %u = f32[8,8]{1,0} add(%w, %w), metadata={op_name="jit(step)/sgd/add"}, backend_config={"estimated_cycles":"5"}
  %k = f32[8,8]{0,1} copy(%u), backend_config={"estimated_cycles":"2"}
  %s = (f32[8,8]{1,0}, bf16[4]{0}) all-reduce(%k, %b), metadata={op_name="jit(step)/psum"}
  %g = bf16[16]{0} all-reduce(%b), metadata={op_name="jit(step)/all_gather"}
  %r = f32[4,8]{1,0} reduce-scatter(%k), replica_groups={{0,1},{2,3}}, dimensions={0}
  %a = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%b), replica_groups=[2,4]<=[8]
  %a2 = bf16[32]{0} all-gather-done(%a)
  %b1 = bf16[64]{0} fusion(%b), kind=kCustom, calls=%begins
  %b2 = bf16[64]{0} fusion(%b1), kind=kCustom, calls=%goes_on
  ROOT %o = f32[8,8]{1,0} copy(%k)
}
"""


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=8] {'data'}", 8),
        ("mesh['data'=8,'model'=4], device_ids=([4,8]T(1,0)) {'data':(2)4,'model'}", 16),
    ],
)
def test_groups_of_devices_are_counted(groups, size):
    line = f"  %r = f32[4,8]{{1,0}} reduce-scatter(%k), replica_groups={groups}, dimensions={{0}}"
    assert program._group(line) == size


def test_a_program_is_read_as_it_stands():
    memory = SimpleNamespace(peak_memory_in_bytes=3, argument_size_in_bytes=2, temp_size_in_bytes=1)
    compiled = SimpleNamespace(as_text=lambda: HLO, memory_analysis=lambda: memory)
    found = program.read(compiled)
    cycles = dict.fromkeys(program.KINDS, 0)
    assert found.cycles == cycles | {
        "convolutions": 300,
        "normalisation": 7,
        "update": 5,
        "copies": 2,
    }
    assert found.collectives == (
        program.Collective("gather", "all-gather", "bf16", 64 + 128),
        program.Collective("gather", "all-reduce", "bf16", 32),
        program.Collective("sum", "all-reduce", "bf16", 8),
        program.Collective("sum", "all-reduce", "f32", 256),
        program.Collective("sum", "reduce-scatter", "f32", 256),
    )
    assert found.summed_in == {"f32": 512, "bf16": 8} and found.gathered_in == {"bf16": 224}
    assert [c.sent for c in found.collectives] == [192, 64, 16, 512, 256]
    assert (found.peak, found.arguments, found.temporaries) == (3, 2, 1)
