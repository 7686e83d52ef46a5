"""bench.py: every loop trains, and the numbers made from times are right."""

import itertools
import types

import torch
from click.testing import CliRunner

import bench
from distributed import World


def small(monkeypatch):
    monkeypatch.setitem(bench.CHUNK, "cpu", 128)


def test_a_command_measures_every_loop(monkeypatch):
    small(monkeypatch)
    command = ["--pairs", "resnet8-resnet8", "--rounds", "1", "--device", "cpu"]
    result = CliRunner().invoke(bench.main, command)
    assert result.exit_code == 0, result.output
    for row in ("plain loop", "this program, first epoch", "this program, cached"):
        assert f"| {row} | " in result.output


def test_all_loops_learn_the_same_and_caching_spares_the_teacher(monkeypatch, tmp_path):
    """Two steps of the plain loop and of this program give the same student, from the same draws."""
    small(monkeypatch)
    made, asked = [], []
    create_model, logits = bench.create_model, bench.Teacher.logits

    def watched(name):
        torch.manual_seed(len(made) % 2)        # a teacher, then its student
        made.append(create_model(name))
        return made[-1]

    monkeypatch.setattr(bench, "create_model", watched)
    monkeypatch.setattr(bench.Teacher, "logits", lambda self, x: asked.append(len(x)) or logits(self, x))
    train = bench.Split(*(x for x in bench.synthetic(128, 1)))
    data = bench.Data(train, train, train, "test")
    recipe = bench.recipes.recipe("resnet8", "resnet8", "kd", zscore=True) | {
        "teacher": "resnet8", "student": "resnet8", "method": "kd", "zscore": True, "seed": 0,
        "precision": "fp32"}
    loops = (bench.plain_steps(recipe, data, torch.device("cpu")),
             bench.our_steps(recipe, data, World("cpu"), tmp_path, [0, 0], False))
    for steps in loops:
        assert [next(steps), next(steps)] == [64, 64]
    plain, ours = (dict(network.named_parameters()) for network in made[1::2])
    for name, value in plain.items():       # but for the cached logits' rounding to float16
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)
    torch.manual_seed(1)
    assert (plain["conv1.weight"] - create_model("resnet8").conv1.weight).abs().max() > 1e-2
    before = sum(asked)
    assert [*loops[1]] == [64, 64] and sum(asked) == before     # the second time from the cache


def test_rounds_take_turns_and_ratios_are_of_the_same_round(monkeypatch):
    """The clock gives each loop 1 s a chunk, then the program 2 and 4 times as long."""
    small(monkeypatch)
    clock = itertools.accumulate([0, 1, 0, 1, 0, 1, 0, 2, 0, 4, 0, 8])
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    rates = {"plain loop": [], "this program, cached": []}
    for i in range(6):
        rate = bench.images_per_second(itertools.repeat(64), 128, torch.device("cpu"))
        rates[list(rates)[i % 2]].append(rate)
    assert rates == {"plain loop": [128, 128, 32], "this program, cached": [128, 64, 16]}
    assert "| this program, cached | 64 (16 to 128) | x 0.50 |" in bench.table("a-b", rates)
