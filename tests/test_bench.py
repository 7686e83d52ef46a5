"""bench.py: every contestant of every experiment does its steps, and the numbers that are made from times are right."""

import itertools
import types

import pytest
import torch

import bench
import train_cifar

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["kd", "mlkd"])
def test_every_contestant_does_its_steps(method, monkeypatch, tmp_path):
    monkeypatch.setitem(train_cifar.AHEAD, "cpu", 128)
    monkeypatch.setitem(bench.EXPERIMENTS, "small", ("resnet8", "resnet8", method))
    recipe, data = bench.resolved("small", CPU, False), bench.images_on(CPU)
    contestants = bench.plain_loop(recipe, data, CPU, 2) | {"this": bench.this_program(recipe, data, CPU, 2, tmp_path)}
    assert set(contestants["this"]) == set(bench.ROWS) == set(contestants["plain"])
    for column, calls in contestants.items():
        for row, call in calls.items():
            assert call() == (8 if (column, row) == ("workers", "data") else 2), (column, row)
    assert bench.peak("resnet56-resnet20", "cpu", "this", 1) > 100


def test_imagenets_loading_and_step_are_measured(tmp_path):
    bench.jpeg_folder(tmp_path, 8)
    result = bench.imagenet(CPU, 1, tmp_path, 4)
    assert result["images"] == 8 and all(row["img_s"] > 0 for row in result["rows"].values())
    for rate, limit in ((1e-9, "loading"), (1e9, "the step")):
        result["rows"]["loading, this program"]["img_s"] = rate
        table = bench.imagenet_table(result)
        assert f"resnet34-resnet18: {limit} limits" in table and f"resnet50-MobileNetV1: {limit} limits" in table


def test_a_folder_without_images_is_one_line(tmp_path):
    with pytest.raises(bench.runs.RunError, match="no folders of images, one for each class, in .*train"):
        bench.imagenet(CPU, 1, tmp_path, 4)


def test_ratios_are_of_the_same_round(monkeypatch):
    times = itertools.accumulate([0, 0, 0, 1, 0, 2, 0, 4, 0, 8])    # warm-up, then plain 1 s and this 2 s, then 4 and 8
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    rates = bench.measure({"plain": {"data": lambda: 1}, "this": {"data": lambda: 4}}, 2, CPU)
    assert rates == {("plain", "data"): [64.0, 16.0], ("this", "data"): [128.0, 32.0]}


def test_projected_hours():
    """A teacher that costs nothing, one that is never known again, and full batches: 1 image of 1024 costs 256."""
    assert bench.hours(240, 100, 100, 1024, 256) == pytest.approx(240 * 50_000 / 100 / 3600)
    assert bench.hours(1, 50, 100, 1024, 256) == pytest.approx(50_000 / 50 / 3600)
    late = bench.hours(10_001, 50, 100, 1024, 256) - bench.hours(10_000, 50, 100, 1024, 256)
    assert late == pytest.approx(50_000 * (0.01 + 0.25 * 0.01) / 3600, rel=1e-6)


def test_the_arithmetic_is_counted():
    first, remembered, rate = bench.floor(bench.resolved("resnet56-resnet20", CPU, False), CPU)
    # multiply-adds of the literature: 125.5 and 40.6 million for the two; a step is three forward passes, but for the first
    # convolution's gradient with respect to the images
    assert rate / remembered == pytest.approx(2 * 3 * 40.6e6, rel=0.03)
    assert rate / first - rate / remembered == pytest.approx(2 * 125.5e6, rel=0.02)
