"""Loading SSD-LM: the published layout, whole or not at all."""

from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from ssd_folder import ModelError, find_folder
from ssd_model import load_model

FOLDER = GOLDEN / "ssd_lm"


@pytest.fixture
def copy(tmp_path):
    import shutil

    return Path(shutil.copytree(FOLDER / "model", tmp_path / "model"))


def test_the_pt_layers_and_the_safetensors_layers_are_the_same(copy):
    together = load_model(copy)
    (copy / "extra_layers.safetensors").unlink()
    apart = load_model(copy)
    for name in ("embed_sum", "time_weight", "time_bias"):
        assert torch.equal(getattr(together, name), getattr(apart, name))


def only_pt(copy):
    (copy / "extra_layers.safetensors").unlink()
    return copy / "embed_sum_layer.pt", copy / "timestep_layer.pt"


def test_a_module_prefix_is_taken_off_every_name_or_none(copy):
    _, timestep = only_pt(copy)
    state = torch.load(timestep, weights_only=True)
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    torch.save(bare, timestep)
    load_model(copy)
    torch.save({"module.weight": bare["weight"], "bias": bare["bias"]}, timestep)
    with pytest.raises(ModelError, match=r"only some names start with 'module\.'"):
        load_model(copy)


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"module.extra": torch.ones(1)}, "extra belongs to no layer"),
        (lambda s: {"module.weight": s["module.weight"]}, "timestep_layer.bias is missing"),
        (lambda s: s | {"module.bias": torch.ones(3)}, r"bias has shape \(3,\)"),
        (lambda s: s | {"module.bias": s["module.bias"].long()}, "not a floating point"),
        (lambda s: [1, 2], "does not hold a state dict"),
        (lambda s: {"module.weight": Harmful()}, "nothing else is unpickled"),
    ],
    ids=["left over", "missing", "misshapen", "integers", "no dict", "code"],
)
def test_a_layer_is_loaded_whole_or_not_at_all(copy, change, message, capfd):
    _, timestep = only_pt(copy)
    torch.save(change(torch.load(timestep, weights_only=True)), timestep)
    with pytest.raises(ModelError, match=message):
        load_model(copy)
    assert "run" not in capfd.readouterr().out


def test_a_cut_file_is_named(copy):
    embed, _ = only_pt(copy)
    embed.write_bytes(embed.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"embed_sum_layer\.pt is not a plain file of tensors"):
        load_model(copy)


def test_a_missing_weight_of_the_masked_language_model_is_an_error(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    state = load_file(file)
    name = next(n for n in state if n.endswith("query.weight"))
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"missing keys: {name}"):
        load_model(copy)


def test_an_old_pytorch_model_bin_loads_the_same(copy):
    model = load_model(copy)
    from safetensors.torch import load_file

    state = load_file(copy / "model.safetensors")
    state["roberta.embeddings.position_ids"] = torch.arange(70)[None]  # of older transformers
    torch.save(state, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    ours = load_model(copy).roberta.state_dict()
    for name, tensor in model.roberta.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_a_hub_id_is_downloaded_as_files_only(monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(FOLDER / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_folder("xhan77/ssdlm") == FOLDER / "model"
    assert asked["repo"] == "xhan77/ssdlm"
    assert "embed_sum_layer.pt" in asked["patterns"]
    assert not any(pattern.endswith(".py") for pattern in asked["patterns"])


def test_without_a_network_a_hub_id_gives_one_sentence(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"the hub did not give it \(no route to host\)"):
        find_folder("xhan77/ssdlm")
