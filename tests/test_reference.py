"""Tests of the comparison of a toy run's losses and accuracies with tests/reference.json."""

import json
import math
import sys

import pytest

from llava import read_json
from tests import toy


@pytest.fixture
def runs(tmp_path):
    """The folder of a toy run whose losses and accuracies are equal to the reference."""
    curves = read_json(toy.REFERENCE)["curves"]
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        write_losses(tmp_path / stage, [*curves[f"{stage} loss"]["values"], 0.5])
    toy.write_json(tmp_path / "result.json",
                   {name: curves[name]["values"][0] for name in ("IMG", "IMG_blank", "Avg")} | {"seconds": 1})
    return tmp_path


def write_losses(folder, losses):
    (folder / "log.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))


def test_reference_has_50_losses_per_stage_and_higher_accuracy_with_images():
    content = read_json(toy.REFERENCE)
    curves = content["curves"]
    assert content["seeds"] >= 5
    for stage in ("stage1", "stage2"):
        values, tolerance = curves[f"{stage} loss"].values()
        assert len(values) == len(tolerance) == 50 and min(tolerance) > 0
        assert max(values[-5:]) + max(tolerance[-5:]) < math.log(742), "below the loss of uniform guessing"
    values, tolerance = curves["stage1 loss"].values()
    assert values[0] - tolerance[0] > values[-1] + tolerance[-1], "the tolerance is smaller than the decrease"
    highest_blank = curves["IMG_blank"]["values"][0] + curves["IMG_blank"]["tolerance"][0]
    assert curves["IMG"]["values"][0] - curves["IMG"]["tolerance"][0] > highest_blank


def test_run_equal_to_the_reference_is_within(runs):
    within, sentence = toy.check_run(runs)
    assert within and sentence.startswith("within tests/reference.json")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("change", [1.01, -1.01, float("nan")])
def test_loss_outside_its_tolerance_is_reported(runs, stage, change):
    expected = read_json(toy.REFERENCE)["curves"][f"{stage} loss"]
    losses = list(expected["values"])
    losses[30] += change * expected["tolerance"][30]
    write_losses(runs / stage, losses)
    within, sentence = toy.check_run(runs)
    assert not within and f"{stage} loss of step 31 is " in sentence and sentence.count(" instead of ") == 1
    losses[30] = expected["values"][30] + 0.99 * expected["tolerance"][30]
    write_losses(runs / stage, losses)
    assert toy.check_run(runs)[0]


def test_accuracy_outside_its_tolerance_is_reported_with_exit_code_1(runs, monkeypatch, capsys):
    expected, result = read_json(toy.REFERENCE)["curves"]["IMG"], read_json(runs / "result.json")
    toy.write_json(runs / "result.json", result | {"IMG": result["IMG"] - expected["tolerance"][0] - 0.1})
    monkeypatch.setattr(sys, "argv", ["toy.py", "--check", str(runs)])
    with pytest.raises(SystemExit) as error:
        toy.main()
    printed = capsys.readouterr().out
    assert error.value.code == 1 and "IMG is " in printed and "loss" not in printed


def test_run_with_too_few_steps_is_outside(runs):
    write_losses(runs / "stage2", read_json(toy.REFERENCE)["curves"]["stage2 loss"]["values"][:20])
    assert "stage2 loss of step 21 is missing" in toy.check_run(runs)[1]


def test_tolerance_is_twice_the_largest_difference_from_the_first_run():
    losses = [[5.0 - 0.1 * i for i in range(10)] for _ in range(3)]
    losses[1][4] += 0.3
    losses[2][4] -= 0.2
    runs = [{"stage1 loss": run_losses, "IMG": [90 + i]} for i, run_losses in enumerate(losses)]
    reference = toy.make_reference(runs)
    assert reference["stage1 loss"]["values"] == pytest.approx(losses[0])
    assert reference["stage1 loss"]["tolerance"] == pytest.approx([0, *[0.6] * 7, 0, 0])
    assert reference["IMG"] == {"values": [90], "tolerance": [5.0]}
