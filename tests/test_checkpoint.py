"""Checkpoints: exact at any layout in fresh processes, and never loaded when broken."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

STEPS, LATER = 3, 3


def adam_state(run) -> dict[str, torch.Tensor]:
    """Adam's moments and step of this rank's shards, by parameter, with the shard's bounds."""
    from mmi_megatron.train.optimizer import parts

    names = {p: n for n, p in run.model.module.named_parameters()}
    found = {}
    for part in parts(run.optimizer):
        for parameter in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(parameter)
            shard = part._get_model_param_range_map(parameter)["param"]
            for key, value in tensors.items():
                found[f"{names[parameter]} {key} {shard.start}:{shard.end}"] = value.detach().clone()
    return found


def write(tensor: int, folder: Path, precision: str = "fp32", train_language: bool = True) -> dict:
    """On a rank: train, save, and go on; what a resumed run must repeat."""
    from mmi_megatron.train import checkpoint
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(tensor, train__precision=precision), train_language=train_language) as run:
        run.train(STEPS)
        torch.rand(7)
        extra = {"step": run.step, "data": {"cursor": [1, 2]}}
        path = checkpoint.save(run.model, run.optimizer, run.scheduler, extra, folder, step=run.step)
        result = {"path": path, "state": adam_state(run), "weights": run.parameters()}
        result["drawn"] = torch.rand(3)
        result["later"] = run.train(LATER)
        return result


def read(tensor: int, path: Path, precision: str = "fp32", again: Path | None = None,
         train_language: bool = True) -> dict:  # fmt: skip
    """On a rank: load, save again elsewhere, and go on."""
    from mmi_megatron.train import checkpoint
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(tensor, train__precision=precision), train_language=train_language) as run:
        extra = checkpoint.load(run.model, run.optimizer, run.scheduler, path)
        run.step = extra["step"]
        result = {"extra": extra, "state": adam_state(run), "weights": run.parameters()}
        result["drawn"] = torch.rand(3)
        if again:
            result["path"] = checkpoint.save(run.model, run.optimizer, run.scheduler, extra, again, run.step)
        result["later"] = run.train(LATER)
        return result


def near(found: list[tuple], expected: list[tuple], tolerance: float) -> None:
    """Losses and norms equal within a relative tolerance."""
    for pair, other in zip(found, expected, strict=True):
        assert pair == pytest.approx(other, rel=tolerance)


def same(found: dict, expected: dict) -> None:
    """All tensors equal, to the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory) -> list[dict]:
    """A run of two tensor-parallel ranks and its checkpoint."""
    return ranks.run(2, write, 2, tmp_path_factory.mktemp("tp2"))


def test_a_fresh_start_at_the_same_layout_continues_exactly(written, other_ranks):
    for before, after in zip(written, other_ranks.run(2, read, 2, written[0]["path"]), strict=True):
        assert after["extra"] == {"step": STEPS, "data": {"cursor": [1, 2]}}
        same(after["weights"], before["weights"])
        same(after["state"], before["state"])
        assert torch.equal(after["drawn"], before["drawn"])
        assert after["later"] == before["later"]
        steps = {float(value) for name, value in after["state"].items() if " step " in name}
        assert steps == {STEPS}


def test_from_two_ranks_to_one_and_back(written, other_ranks, ranks, tmp_path):
    (alone,) = other_ranks.run(1, read, 1, written[0]["path"], "fp32", tmp_path)
    same(alone["weights"], written[0]["weights"])
    near(alone["later"], written[0]["later"], 2e-6)
    back = other_ranks.run(2, read, 2, alone["path"])
    for before, after in zip(written, back, strict=True):
        same(after["state"], before["state"])
        assert after["later"] == before["later"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_replicas(ranks, other_ranks, tmp_path, precision):
    before = ranks.run(2, write, 1, tmp_path, precision)
    for old, new in zip(before, other_ranks.run(2, read, 1, before[0]["path"], precision), strict=True):
        same(new["state"], old["state"])
        assert new["later"] == old["later"]
    (alone,) = other_ranks.run(1, read, 1, before[0]["path"], precision)
    same(alone["weights"], before[0]["weights"])
    near(alone["later"], before[0]["later"], 2e-6 if precision == "fp32" else 1e-2)


def test_a_run_that_trains_image_parts_only(ranks, other_ranks, tmp_path):
    before = ranks.run(2, write, 2, tmp_path, "fp32", False)
    after = other_ranks.run(2, read, 2, before[0]["path"], "fp32", None, False)
    assert [run["later"] for run in after] == [run["later"] for run in before]


def refusal(path: Path, train_language: bool = True) -> tuple[str, bool]:
    """On a rank: the error of loading, and whether the weights stayed as they were."""
    from mmi_megatron.train import checkpoint
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(1), train_language=train_language) as run:
        before = run.parameters()
        try:
            checkpoint.load(run.model, run.optimizer, run.scheduler, path)
        except checkpoint.CheckpointError as error:
            return str(error), all(torch.equal(before[n], v) for n, v in run.parameters().items())
        return "loaded", True


class Evil:
    """Unpickling it would run a command."""

    def __reduce__(self):
        import os

        return os.system, ("true",)


def damage(path: Path, how: str) -> str:
    """Break a checkpoint; the name of the file that the error must give."""
    if how == "cut":
        file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[:-100])
        return file.name
    if how == "file lost":
        file = next(path.glob("*.distcp"))
        file.unlink()
        return file.name
    if how == "no marker":
        (path / "complete.json").unlink()
        return "complete.json"
    if how == "evil index":
        (path / ".metadata").write_bytes(pickle.dumps(Evil()))
        listed = json.loads((path / "complete.json").read_text())
        listed[".metadata"]["bytes"] = (path / ".metadata").stat().st_size
        (path / "complete.json").write_text(json.dumps(listed))
        return "system"
    shutil.rmtree(path)
    return "does not exist"


def copied(written: list[dict], folder: Path) -> Path:
    """A copy of the checkpoint, its frozen weights beside it."""
    shutil.copytree(written[0]["path"].parent, folder, dirs_exist_ok=True)
    return folder / "step_0000003"


@pytest.mark.parametrize("how", ["cut", "file lost", "no marker", "evil index", "gone"])
def test_a_broken_checkpoint_is_refused_by_name(written, other_ranks, tmp_path, how):
    path = copied(written, tmp_path)
    named = damage(path, how)
    (message, untouched) = other_ranks.run(1, refusal, path)[0]
    assert "refused" in message and named in message and untouched


def test_a_checkpoint_without_the_state_of_what_is_now_trained_is_refused(ranks, other_ranks, tmp_path):
    path = ranks.run(1, write, 1, tmp_path, "fp32", False)[0]["path"]
    message, untouched = other_ranks.run(1, refusal, path)[0]
    assert "lacks" in message and "optimizer.state" in message and "frozen" in message and untouched


def finding(written: Path, folder: Path) -> list:
    """On a rank: what ``latest`` finds while checkpoints come and break."""
    from mmi_megatron.train import checkpoint

    found = [checkpoint.latest(folder)]
    (frozen,) = written.parent.glob("frozen_*")
    shutil.copytree(frozen, folder / frozen.name)
    for name in ("step_0000002", "step_0000010", "step_0000011.tmp", "step_0000012", "step_12345678"):
        shutil.copytree(written, folder / name)
    damage(folder / "step_0000012", "no marker")
    damage(folder / "step_12345678", "cut")
    (folder / "step_0000013").mkdir()
    (folder / "notes").mkdir()
    return [*found, checkpoint.latest(folder)]


def test_the_newest_whole_one_is_found(written, other_ranks, tmp_path):
    nothing, found = other_ranks.run(1, finding, Path(written[0]["path"]), tmp_path)[0]
    assert nothing is None and found.local == tmp_path / "step_0000010"


def keeping(folder: Path) -> list[list[str]]:
    """On a rank: save after every step and keep two and every third, over the draft of a run that was
    killed and the frozen weights of another."""
    from mmi_megatron.train.checkpoint import Checkpoints
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(1)) as run:
        if run.layout.rank == 0:
            for lost in ("step_0000002.tmp", "frozen_of_nobody"):
                (folder / lost).mkdir(parents=True)
                (folder / lost / "old").write_text("half")
        checkpoints = Checkpoints(folder, folder, keep=2, keep_every=3)
        for step in (1, 2, 3, 4, 5, 6, 7, 7):
            checkpoints.save(run.model, run.optimizer, run.scheduler, {}, step)
            run.train(1)
        checkpoints.wait()
        return [sorted(path.name for path in folder.iterdir()), inodes(folder)]


def inodes(folder: Path) -> list[str]:
    """Files of the frozen weights, with what tells a file from one written in its place."""
    files = [file for frozen in folder.glob("frozen_*") for file in frozen.iterdir()]
    return sorted(f"{file.name} {file.stat().st_ino} {file.stat().st_mtime_ns}" for file in files)


def test_the_last_and_every_third_are_kept_and_drafts_are_cleared(other_ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    names, frozen = other_ranks.run(2, keeping, folder)[0]
    assert names[1:] == [f"step_000000{step}" for step in (3, 6, 7)]
    assert names[0].startswith("frozen_") and names[0] != "frozen_of_nobody"
    assert len(frozen) >= 4
    other_ranks.run(2, write, 1, folder)
    assert inodes(folder) == frozen, "the frozen weights were written again"


def frozen_digest(tensor: int, change: str) -> str:
    """On a rank: name of the tiny model's frozen weights, one of them changed."""
    from mmi_megatron.train import frozen
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(tensor), train_language=False) as run:
        weight = run.model.module.up.weight.data
        with torch.no_grad():
            if change == "last bit":
                weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
            elif change == "two swapped":
                weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
            elif change == "trained":
                run.model.module.vision.proj.weight.zero_()
        return frozen.digest(frozen.split(run.model.module.sharded_state_dict(), run.model.module)[1])


def test_frozen_weights_are_named_by_what_they_are_at_any_layout(other_ranks):
    first, second = other_ranks.run(2, frozen_digest, 2, "")
    assert first == second == other_ranks.run(1, frozen_digest, 1, "")[0] and len(first) == 32
    assert other_ranks.run(2, frozen_digest, 1, "trained")[1] == first
    for change in ("last bit", "two swapped"):
        assert other_ranks.run(1, frozen_digest, 1, change)[0] != first


def beside_training(folder: Path) -> tuple:
    """On a rank: a save that is held up while training goes on; what was there when it began."""
    import threading

    from mmi_megatron.train import checkpoint_writer
    from mmi_megatron.train.checkpoint import Checkpoints, latest
    from tests.tiny import Run, tiny_config

    gate, plain = threading.Event(), checkpoint_writer._Staging.write
    checkpoint_writer._Staging.write = lambda staging: (gate.wait(60), plain(staging))[1]
    try:
        with Run(tiny_config(1)) as run:
            run.train(STEPS)
            checkpoints = Checkpoints(folder, folder)
            extra = {"step": run.step, "data": {"cursor": [1, 2]}}
            checkpoints.save(run.model, run.optimizer, run.scheduler, extra, run.step)
            before = {"weights": run.parameters(), "state": adam_state(run), "later": run.train(LATER)}
            held = checkpoints.poll() is None and latest(folder) is None
            gate.set()
            saved = checkpoints.wait()
            return before, held, saved.step, saved.stall, str(latest(folder))
    finally:
        checkpoint_writer._Staging.write = plain


def test_training_goes_on_while_a_checkpoint_is_written(ranks, other_ranks, tmp_path):
    before, held, step, stall, path = ranks.run(2, beside_training, tmp_path)[0]
    assert held and step == STEPS and 0 < stall < 30
    after = other_ranks.run(2, read, 1, Path(path))[0]
    same(after["weights"], before["weights"])
    same(after["state"], before["state"])
    assert after["later"] == before["later"]


def interrupted(folder: Path) -> list:
    """On a rank: saves of step 2 that end at the first, second, third... thing they do to the file
    system; after each, what is found. The last one ends by itself."""
    from mmi_megatron.train import checkpoint_folder
    from mmi_megatron.train.checkpoint import save
    from mmi_megatron.train.storage import Folder
    from tests.tiny import Run, tiny_config

    plain = {
        (Folder, "write"): Folder.write,
        (Path, "rename"): Path.rename,
        (Folder, "delete"): Folder.delete,
    }
    found = []
    with Run(tiny_config(1)) as run:
        save(run.model, run.optimizer, run.scheduler, {}, folder, 1)
        run.train(1)
        for most in range(1, 60):
            done = [0]

            def counted(function, done=done, most=most):
                def act(*arguments):
                    done[0] += 1
                    if done[0] > most:
                        raise OSError("the disk is full")
                    return function(*arguments)

                return act

            for (kind, name), function in plain.items():
                setattr(kind, name, counted(function))
            try:
                save(run.model, run.optimizer, run.scheduler, {}, folder, 2)
                found.append("finished")
                break
            except OSError as error:
                assert "disk is full" in str(error)
            finally:
                for (kind, name), function in plain.items():
                    setattr(kind, name, function)
            newest = checkpoint_folder.newest(folder)
            found.append([newest.name, checkpoint_folder.verify(newest)])
    return found


def test_a_save_that_ends_anywhere_leaves_no_half_and_its_error_is_raised(other_ranks, tmp_path):
    *found, last = other_ranks.run(1, interrupted, tmp_path)[0]
    assert last == "finished" and len(found) > 5
    assert all(entry in (["step_0000001", []], ["step_0000002", []]) for entry in found)
    assert found[0][0] == "step_0000001"


def one_cannot_write(folder: Path) -> list[str]:
    """On a rank: a save for which rank 1 has no space, and what is found then."""
    from mmi_megatron.train.checkpoint import latest, save
    from mmi_megatron.train.storage import Folder
    from tests.tiny import Run, tiny_config

    def full(*_):
        raise OSError("no space left on device")

    plain = Folder.write
    with Run(tiny_config(1)) as run:
        save(run.model, run.optimizer, run.scheduler, {}, folder, 1)
        Folder.write = full if run.layout.rank == 1 else plain
        try:
            save(run.model, run.optimizer, run.scheduler, {}, folder, 2)
        except OSError as error:
            return [str(error), latest(folder).name]
        finally:
            Folder.write = plain
        return ["saved"]


def test_a_rank_that_cannot_write_ends_the_save_on_all_by_name(other_ranks, tmp_path):
    for said, newest in other_ranks.run(2, one_cannot_write, tmp_path, timeout=60):
        assert "step_0000002 could not be written: rank 1: OSError: no space left" in said
        assert "rank 0" not in said and newest == "step_0000001"


def test_verify_names_the_file_with_a_flipped_bit(written, tmp_path):
    from mmi_megatron.train.checkpoint_folder import fault, verify

    path = copied(written, tmp_path)
    assert verify(path) == []
    for folder in (path, next(tmp_path.glob("frozen_*"))):
        file = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert fault(path) is None
        (wrong,) = verify(path)
        assert file.name in wrong and folder.name in wrong and "damaged" in wrong
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    shutil.rmtree(folder)
    assert folder.name in fault(path)


def weights_alone(tensor: int, path: Path) -> dict:
    """On a rank: the weights without an optimizer."""
    from mmi_megatron.train import checkpoint
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(tensor)) as run:
        checkpoint.load_weights(run.model.module, path)
        return run.parameters()


def test_weights_alone(written, other_ranks):
    same(other_ranks.run(1, weights_alone, 1, written[0]["path"])[0], written[0]["weights"])


def whole_model(tensor: int, seed: int, folder: Path | None, path: Path | None) -> dict:
    """On a rank: the real model, saved or loaded; its undivided weights and the path."""
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_model
    from mmi_megatron.parallel.plain import gather_plain
    from mmi_megatron.train import checkpoint
    from mmi_megatron.train.optimizer import build_optimizer, wrap
    from tests.samples import SPECIAL, small_config

    config = small_config(tensor, seed=seed)
    groups.initialize(config)
    try:
        model = build_model(config, SPECIAL)
        wrapped = wrap(model, config)
        optimizer, scheduler = build_optimizer(wrapped, config)
        if folder:
            path = checkpoint.save(wrapped, optimizer, scheduler, {}, folder, step=0)
        else:
            checkpoint.load(wrapped, optimizer, scheduler, path)
        weights = gather_plain(model.language_model)
        for index, part in enumerate(model.image_parts()):
            weights |= {f"{index}.{name}": value.clone() for name, value in part.state_dict().items()}
        return {"path": path, "weights": weights}
    finally:
        groups.destroy()


def test_the_whole_model_before_its_first_step_from_two_ranks_to_one(ranks, other_ranks, tmp_path):
    saved = ranks.run(2, whole_model, 2, 1, tmp_path, None)[0]
    (loaded,) = other_ranks.run(1, whole_model, 1, 2, None, saved["path"])
    same(loaded["weights"], saved["weights"])
