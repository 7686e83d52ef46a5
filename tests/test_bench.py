"""bench.py: every part of every column does its steps, and the numbers that are made from times are right."""

import itertools
import types
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import bench
import feature_kd
import train_cifar
from conftest import forked
from distributed import World
from models import Features

CPU = torch.device("cpu")


def set_clock(monkeypatch, times):
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=iter(times).__next__))


def test_an_experiment_has_all_its_numbers(monkeypatch):
    """With a clock that goes on by a second when it is read, images per second are the images of a part."""
    monkeypatch.setitem(train_cifar.CHUNK, "cpu", 128)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", partial(ProcessPoolExecutor, mp_context=forked()))
    set_clock(monkeypatch, itertools.count())
    result = bench.experiment("resnet8-resnet8", World("cpu"), 1, False)
    for row, cells in result["rates"].items():
        for column in ("workers", "baseline", "this"):
            images = 4 * 128 if row == "data" and column != "this" else 128
            assert cells[column] == [images], (row, column)
    assert tuple(result["rates"]) == bench.ROWS and set(result["hours"]) == {"workers", "baseline", "this"}
    assert min(result["peak_mib"].values()) > 100
    text = bench.table(result)
    assert all(x in text for x in ("| whole, cached |", "240 epochs, projected", "MiB", "matrix product"))


def test_two_views_from_every_source(monkeypatch, tmp_path):
    monkeypatch.setitem(train_cifar.CHUNK, "cpu", 64)
    for column in ("workers", "baseline", "this"):
        parts = bench.parts_of("resnet8-resnet8-mlkd", column, World("cpu"), tmp_path)
        views, target, *_ = next(iter(parts["data"].batches))
        assert [x.shape for x in views] == [(64, 3, 32, 32)] * 2 and target.shape == (64,)
        assert not torch.equal(*views) and 0.5 < torch.stack(views).std() < 2
        assert bench.measure({0: {0: parts["whole, cached"]}}, 1, CPU)[0][0][0] > 0


def test_steps_train_and_the_teacher_is_asked_where_it_should(monkeypatch, tmp_path):
    monkeypatch.setitem(train_cifar.CHUNK, "cpu", 128)
    calls, make_step, logits = [], bench.make_step, bench.Teacher.logits

    def watched_make(distiller, *rest):
        step = make_step(distiller, *rest)

        def watched(views, target, index, teacher_logits):
            before = [p.detach().clone() for p in distiller.parameters()]
            done = step(views, target, index, teacher_logits)
            assert len(teacher_logits) == 1 and not all(map(torch.equal, before, distiller.parameters()))
            calls.append("step")
            return done
        return watched

    def watched_logits(self, images):
        calls.append("teacher")
        return logits(self, images)

    monkeypatch.setattr(bench, "make_step", watched_make)
    monkeypatch.setattr(bench.Teacher, "logits", watched_logits)
    steps, expected = ["step"] * 2, {"data": [], "teacher": ["teacher"]}
    for column, first in (("this", ["teacher"]), ("baseline", [])):     # whose teacher is another class
        for row, part in bench.parts_of("resnet8-resnet8", column, World("cpu"), tmp_path).items():
            calls.clear()
            bench.measure({row: {column: part}}, 0, CPU)
            wanted = {"data": [], "teacher": first, "whole, first epoch": first + steps}.get(row, steps)
            assert calls == wanted, (column, row)


def test_rounds_take_turns_and_ratios_are_of_the_same_round(monkeypatch):
    """After warm-up the baseline takes 1 s, the program 2 s, then 4 and 8; one part of two rows runs once."""
    set_clock(monkeypatch, itertools.accumulate([0, 1, 0, 1, 0, 1, 0, 2, 0, 4, 0, 8]))
    batch = (None, [0] * 64)
    theirs, ours = bench.Part(itertools.repeat(batch), 1), bench.Part(itertools.repeat(batch), 4)
    rates = bench.measure({"a": {"baseline": theirs, "this": ours}, "b": {"baseline": theirs}}, 2, CPU)
    assert rates == {"a": {"baseline": [64, 16], "this": [128, 32]}, "b": {"baseline": [64, 16]}}
    rates = {"a": {"baseline": [1, 5, 100], "this": [3, 20, 50]}}       # ratios 3, 4, 0.5; of the medians 4
    lines = bench.table({"experiment": "x", "rates": rates, "notes": ["a note"]}).splitlines()
    assert lines[:3] == ["| x, images/s | baseline | this program |", "| --- | --- | --- |",
                         "| a | 5 (1 to 100) | 20 (3 to 50), x 3.00 |"] and "a note" in lines


def test_skipped_steps_do_not_count(monkeypatch):
    set_clock(monkeypatch, [0, 100, 102] * 2)
    part = bench.Part(itertools.repeat((None, [0] * 8)), 5, skip=2)
    assert bench.measure({0: {0: part}}, 1, CPU) == {0: {0: [12]}}


def test_imagenets_loading_and_step_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LOADED", 4)
    monkeypatch.setattr(bench, "IMAGENET", [("resnet18", "squeezenet1_1"), ("squeezenet1_1", "resnet18")])
    result = bench.imagenet(World("cpu"), 1, bench.jpeg_folder(tmp_path, 4), 2)
    rates = result["rates"]
    assert all(rate > 0 for cells in rates.values() for values in cells.values() for rate in values)
    assert set(rates["loading"]) == {"baseline", "this"} and len(rates) == 6
    assert bench.table(result).count("limits; 100 epochs") == 2
    for rate, limit in ((1e-9, "loading"), (1e9, "the step")):
        rates["loading"]["this"] = [rate]
        assert [f": {limit} limits; " in line for line in bench.limits(rates)] == [True, True]


def test_a_folder_without_images_is_one_line(tmp_path):
    with pytest.raises(bench.RunError, match="no folders of images in .*train"):
        bench.imagenet(World("cpu"), 1, tmp_path, 4)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "PAIR", "resnet8-resnet8")
    monkeypatch.setattr(bench, "IMAGES", 500)
    monkeypatch.setattr(feature_kd.CRD, "NEGATIVES", 20)


def test_feature_methods_steps_are_measured(small, monkeypatch):
    """The clock goes on by a second when it is read; what CRD's loader had ready before does not count."""
    set_clock(monkeypatch, itertools.count())
    result = bench.features(World("cpu"), 1, False)
    assert [*result["rates"]] == [*bench.FEATURE_NAMES.values()]
    assert all(cells == {"baseline": [64], "this": [64]} for cells in result["rates"].values())
    assert "| CRD | 64 (64 to 64) | 64 (64 to 64), x 1.00 |" in bench.table(result)


def test_crd_and_rkd_have_the_fields_form_in_the_baseline_alone(small, monkeypatch):
    calls, prepared, prepare = [], [], bench.Teacher.prepare
    monkeypatch.setattr(bench.Teacher, "prepare", lambda *a: prepared.append(a) or prepare(*a))
    for name, loss in bench.PLAIN.items():
        monkeypatch.setitem(bench.PLAIN, name, lambda *a, n=name, f=loss: calls.append((n, a[4])) or f(*a))
    for name in bench.PLAIN:
        part = bench.feature_part(name, "this", World("cpu"))
        assert part.use(*next(iter(part.batches))) is None and not calls
    for name in bench.PLAIN:
        part = bench.feature_part(name, "baseline", World("cpu"))
        (_, ce, kd, feature), _ = part.use(*next(iter(part.batches)))      # it reads them
        assert ce > 0 and kd == 0 and 0 < feature < float("inf")
    assert len(prepared) == 2       # the baseline's teacher computes all that it can
    (_, index), (_, plain) = sorted(calls, key=lambda call: call[0])
    assert index.shape == (64, 21) and plain.shape == (64,)
    assert all(len(set(row)) == 21 for row in index.tolist())       # without replacement, of other classes
    assert bool((index[:, 1:] % 100 != index[:, :1] % 100).all())


@pytest.mark.parametrize("name", bench.PLAIN)
def test_the_fields_forms_give_the_same_numbers(name, small, monkeypatch):
    """Loss, gradients and what is kept, in two steps, of the same draws."""
    torch.manual_seed(0)
    s, t = (Features((), (), None, torch.randn(6, width, dtype=torch.double)) for width in (8, 12))
    pooled = s.pooled.requires_grad_()
    method = feature_kd.METHODS[name](nn.Identity(), nn.Identity(), s, t, torch.arange(500) % 100).double()
    kept = {k: v.clone() for k, v in method.state_dict().items()}
    draws = [torch.from_numpy(np.random.default_rng(i).integers(500, size=(6, 21))) for i in range(2)]
    numbers = []
    for plain in (False, True):
        method.load_state_dict(kept)
        seen = []
        for chosen in draws:
            monkeypatch.setattr(feature_kd.CRD, "_negatives", lambda *_, chosen=chosen: chosen[:, 1:])
            loss = (bench.PLAIN[name](method, s, t, None, chosen) if plain
                    else method(s, t, None, chosen[:, 0]))
            seen += [loss, *torch.autograd.grad(loss, [pooled, *method.parameters()])]
        numbers.append([*seen, *(v.clone() for v in method.state_dict().values())])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(*numbers, strict=True))
    assert numbers[0][0] > 0.1


def test_projected_hours():
    """A teacher that costs nothing, one that is never cached, and full batches: 1 image of 1024 costs 256."""
    assert bench.hours(240, 100, 100, 1024, 256) == pytest.approx(240 * 50_000 / 100 / 3600)
    assert bench.hours(1, 50, 100, 1024, 256) == pytest.approx(50_000 / 50 / 3600)
    late = bench.hours(10_001, 50, 100, 1024, 256) - bench.hours(10_000, 50, 100, 1024, 256)
    assert late == pytest.approx(50_000 * (0.01 + 0.25 * 0.01) / 3600, rel=1e-6)


def test_the_arithmetic_is_counted():
    rows, rate = bench.roofline(bench.recipe_of("resnet56-resnet20", CPU), CPU)
    both, fast = bench.roofline(bench.recipe_of("resnet56-resnet20-mlkd", CPU), CPU)
    one, two = ({row: x / bound for row, bound in r.items()} for r, x in ((rows, rate), (both, fast)))
    # multiply-adds of the literature: 125.5 and 40.6 million for the two; a step is three forward passes, but
    # for the first convolution's gradient with respect to the images
    assert one["whole, cached"] == pytest.approx(one["student"]) == pytest.approx(2 * 3 * 40.6e6, rel=0.03)
    assert one["teacher"] == pytest.approx(2 * 125.5e6, rel=0.02)
    for flops in (one, two):
        assert flops["whole, first epoch"] == pytest.approx(flops["teacher"] + flops["student"])
    assert two["student"] == pytest.approx(2 * one["student"])
    assert two["whole, cached"] == pytest.approx(two["student"] + one["teacher"])


def test_a_vocabularys_rows_say_speed_and_memory(monkeypatch):
    """Only the first number of tokens is asked of all logits at once: more may not fit."""
    seen = []

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            seen.append(arguments)
            return types.SimpleNamespace(result=lambda: function(*arguments))

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "VOCABULARIES", (40, 90))
    monkeypatch.setattr(bench, "TOKENS", (8, 300))
    result = bench.vocabulary(types.SimpleNamespace(device=torch.device("cpu")))
    assert seen == [(40, 8, True, "cpu"), (40, 8, False, "cpu"), (40, 300, False, "cpu"),
                    (90, 8, True, "cpu"), (90, 8, False, "cpu"), (90, 300, False, "cpu")]
    text = bench.table(result)
    assert "tokens/s" in text and "90 words, 300 tokens, this program: " in text and len(result["notes"]) == 7
