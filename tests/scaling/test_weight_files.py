"""Weight files of other people: nothing in them is run, what they hold is found, what is wrong is told."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scaling.schema import ConfigError
from scaling.weight_files import is_hub_name, read_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor([3])}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], v) for k, v in wanted.items())


def refused(where: str | Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_weights(where)
    assert "\n" not in str(error.value)
    return str(error.value)


class Attack:
    """Unpickled, it writes the file that it names."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    proof = tmp_path / "proof"
    content = {**STATE, "b": Attack(proof)}
    path = saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=zipped)
    assert "system" in refused(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the attack works where it is let


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Attack(proof)))
    assert "x.pt" in refused(path)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["x.pth", "old.pth", "x.safetensors"])
def test_all_formats_hold_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(STATE, path)
    else:
        saved(path, STATE, _use_new_zipfile_serialization=name == "x.pth")
    file = read_weights(path)
    assert equal(file.states[""], STATE)
    assert (file.name, file.notes[""]) == (path.stem, ())


@pytest.mark.parametrize("name", ["x.pth", "old.pth", "x.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_short_is_one_line(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    state = {"a": torch.randn(100, 100)}
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        saved(path, state, _use_new_zipfile_serialization=name == "x.pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert str(path) in refused(path)


def test_known_nestings_and_prefixes_are_taken_away_and_told(tmp_path: Path) -> None:
    other = {"b": torch.zeros(1)}
    wrapped = {f"module._orig_mod.{key}": value for key, value in STATE.items()}
    trainer = {"config": {"depth": 2}, "var_wo_ddp": wrapped, "vae_local": other, "var_opt": {"state": {}}}
    file = read_weights(saved(tmp_path / "x.pth", {"args": {"lr": 1.0}, "epoch": 3, "trainer": trainer}))
    assert list(file.states) == ["trainer.var_wo_ddp", "trainer.vae_local"]
    assert equal(file.states["trainer.var_wo_ddp"], STATE)
    assert equal(file.states["trainer.vae_local"], other)
    told = file.notes["trainer.var_wo_ddp"]
    assert "trainer.var_wo_ddp" in told[0]
    assert "module._orig_mod." in told[1]


def test_halves_are_read_as_fp32_and_only_what_all_keys_share_is_a_prefix(tmp_path: Path) -> None:
    half = {"module.a": torch.randn(3).half(), "b": torch.randn(3).bfloat16()}
    found = read_weights(saved(tmp_path / "x.pth", half)).states[""]
    assert equal(found, {key: value.float() for key, value in half.items()})


@pytest.mark.parametrize(
    "content", [{"epoch": 3, "optimizer": {"a": torch.zeros(1)}}, [torch.zeros(1)], {}, {"model": {}}]
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: Any) -> None:
    message = refused(saved(tmp_path / "x.pth", content))
    assert "no state dict" in message
    assert ("epoch, optimizer" in message) == ("epoch" in content)


def test_places_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "x.pth")
    assert "a folder" in refused(tmp_path)
    assert "no such file" in refused("owner/repo/x.pth")
    assert "no such file" in refused("owner/repo:x.txt")


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def hf_hub_download(repo_id: str, filename: str) -> str:
            asked.append((repo_id, filename))
            return str(saved(tmp_path / "cached.pth", STATE))

        module = SimpleNamespace(hf_hub_download=hf_hub_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)  # type: ignore[arg-type]
        return asked

    @pytest.mark.parametrize(
        ("where", "file"),
        [("owner/re.po:sub/x.pth", "sub/x.pth"), ("hf://owner/re.po/sub/x.pth", "sub/x.pth")],
    )
    def test_names(self, asked: list[tuple[str, str]], where: str, file: str) -> None:
        assert equal(read_weights(where).states[""], STATE)
        assert asked == [("owner/re.po", file)]
        assert is_hub_name(where)

    def test_a_file_of_that_name_wins(
        self, asked: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("owner").mkdir()
        saved(Path("owner/repo:x.pth"), {"b": torch.ones(1)})
        assert list(read_weights("owner/repo:x.pth").states[""]) == ["b"]
        assert not asked

    def test_offline_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def hf_hub_download(repo_id: str, filename: str) -> str:
            raise ConnectionError("no route\nto host")

        module = SimpleNamespace(hf_hub_download=hf_hub_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)  # type: ignore[arg-type]
        message = refused("owner/repo:x.pth")
        assert "no route to host" in message
        assert "give its path" in message

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert "pip install huggingface_hub" in refused("owner/repo:x.pth")
