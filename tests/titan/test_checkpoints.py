"""Checkpoints go from two processes to one, to the plain loop and back, moments included; export; kills."""

import dataclasses
import json
import shutil

import pytest
import runs
import torch

import qwen3next as q
from recipes import titan
from recipes.scaling.checkpoints import Reader, newest, plain_state, write_plain

SAME = 1e-6  # two orders of summation over five steps


def at_five(finished, out):
    """A copy of the finished run as it was after step 5."""
    shutil.copytree(finished.out, out)
    shutil.rmtree(out / "checkpoint" / "step-10")
    return dataclasses.replace(finished, out=out, resume=True)


def close(found, wanted):
    loss, norm = runs.differences(found, wanted)
    assert loss < SAME
    assert norm < 10 * SAME


def test_two_processes_to_one(finished, tmp_path):
    settings = at_five(finished, tmp_path / "run")
    runs.titan(dataclasses.replace(settings, processes=1))
    found = runs.rows(settings.out)
    assert [row["step"] for row in found] == list(range(1, 11))
    close(found, runs.rows(finished.out))
    assert found[-1]["samples"] == 40  # one integer, in any world


ALL = {"optimizer": "muon", "lr": 5e-4, "ema": 0.9, "skip_spikes": 6.0}


@pytest.mark.parametrize("changes", [{}, ALL], ids=["adamw", "muon, average and spikes"])
def test_two_processes_to_the_plain_loop_and_back(changes, finished, text, tmp_path):
    """Its moments are those of the plain loop, which goes on from them; two processes go on from the loop's state."""
    if changes:
        finished = dataclasses.replace(finished, out=tmp_path / "finished", **changes)
        runs.titan(dataclasses.replace(finished, processes=2))
    settings = at_five(finished, tmp_path / "run")
    alone = runs.Plain(runs.settings_of(text, tmp_path / "plain", runs.tiny(), **changes))
    first = alone.to(5)
    tensors, values = plain_state(settings.out)
    recent = values.pop("recent", None)
    assert recent == ([[row["loss"], row["gradient_norm"]] for row in runs.rows(settings.out)[:5]] if changes else None)
    assert values == {"step": 5, "samples": 20}
    state = alone.tensors(average=bool(changes))
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        bounds = {"atol": 1e-5, "rtol": 1e-4} if name.startswith("model.") else {"atol": 1e-6, "rtol": 1e-3}
        torch.testing.assert_close(tensor, state[name], **bounds)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    recent_before, groups = [list(row) for row in alone.run.state.recent], alone.groups()

    with torch.no_grad():  # the plain loop goes on from the checkpoint of two processes
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
    rest = alone.to(10)
    close(first + rest, runs.rows(finished.out))

    back = dataclasses.replace(settings, out=tmp_path / "back", processes=2)  # and two processes from its state
    shutil.copytree(settings.out, back.out)
    shutil.rmtree(back.out / "checkpoint")
    counts = {"step": 5, "samples": 20, "tokens": 0, "recent": recent_before if changes else None}
    write_plain(back.out / "checkpoint" / "step-5", alone.config, before, groups, **counts)
    runs.titan(back)
    close(runs.rows(back.out), runs.rows(finished.out))
    if changes:
        one, other = (Reader(newest(run.out), alone.config, "average") for run in (back, finished))
        assert max((one[name] - other[name]).abs().max() for name in one) < SAME


def test_the_exported_folder_is_the_last_checkpoint(finished):
    model = q.load(finished.out / "model", device="cpu")
    source = Reader(newest(finished.out), q.ModelConfig.load(finished.out / "model.json"))
    for name, parameter in model.named_parameters():
        assert torch.equal(source[name], parameter), name
    assert (finished.out / "model" / "tokenizer.json").is_file()


def test_a_run_starts_from_a_released_folder(finished, text, tmp_path):
    settings = runs.settings_of(
        text, tmp_path / "run", runs.tiny(), processes=2, expert=2, steps=1, init=str(finished.out / "model"), model=()
    )
    runs.titan(settings)
    alone = runs.Plain(runs.settings_of(text, tmp_path / "plain", runs.tiny(), steps=1))
    alone.model.load_state_dict(q.load(finished.out / "model", device="cpu").state_dict())
    loss, norm = runs.differences(runs.rows(settings.out), alone.to(1))
    assert loss < 2e-6
    assert norm < 2e-5


def test_a_killed_process_ends_the_run_in_a_sentence_and_the_run_resumes(finished, text, tmp_path):
    settings = runs.settings_of(text, tmp_path / "run", runs.tiny(), processes=2, save_every=3)
    done = runs.titan(settings, planted="kill 1 8", check=False)
    assert done.returncode == 1
    said, sentence = done.stderr.strip().splitlines()[-1], "Process 1 of 2 was killed by SIGKILL, so the run stopped."
    assert said.startswith(f"{sentence} Go on with: python -m recipes.titan")
    assert "Traceback" not in done.stderr
    assert newest(settings.out).name in ("step-3", "step-6")  # complete, though written in the background
    runs.titan(dataclasses.replace(settings, resume=True))
    found = runs.rows(settings.out)
    assert [row["step"] for row in found] == list(range(1, 11))
    assert runs.differences(found, runs.rows(finished.out)) == (0.0, 0.0)


def test_another_run_is_not_resumed(finished):
    changed = dataclasses.replace(finished, resume=True, lr=2e-3, processes=2)
    done = runs.titan(changed, check=False)
    assert done.returncode == 1
    assert "lr = 0.001, now it is 0.002" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((finished.out / "settings.json").read_text())["lr"] == 1e-3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"processes": 3}, "cannot be divided among 3 groups"),
        ({"processes": 2, "tensor": 4}, "no multiple of"),
        ({"processes": 4, "tensor": 4}, "does not divide num_key_value_heads 2"),
        ({"processes": 2, "expert": 4}, "must divide the 4 experts and the 2 processes"),
        ({"processes": 2, "replicate": 2, "expert": 2}, "the 1 processes of a replica"),
        ({"processes": 2, "balance": "micro"}, "on many use batch"),
        ({"processes": 2, "samples": 2}, "on many sample from the exported model"),
        ({"processes": 0}, "No processes were started"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(changes, sentence, text, tmp_path, capsys):
    settings = runs.settings_of(text, tmp_path / "run", runs.tiny())
    given = runs.words(settings)
    for name, value in changes.items():
        given += [f"--{name}", str(value)]
    assert titan.main(given) == 1
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not settings.out.exists()
