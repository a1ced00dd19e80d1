from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hardware.errors import SpikeguardError
from pipeline.config import Config, ConfigError, load_config, override_config, preset_names, validate_config


def refused(values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_config(values, "test")
    return str(caught.value)


def written(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name: str) -> None:
    assert isinstance(load_config(name), Config)


def test_there_is_a_preset_for_the_digits_and_it_is_what_the_method_says() -> None:
    config = load_config("digits")
    assert config.finetuning.steps == 8
    assert config.fidelity.epsilon == 0.1
    assert config.training.epsilon == 2 * config.fidelity.epsilon
    assert config.fidelity.margin == 0.02
    assert config.fidelity.certify >= 32
    assert set(config.fidelity.runtimes) == {"emulator", "lava", "netx", "onnxruntime"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("finetuning.steps", 0),
        ("finetuning.steps", -8),
        ("finetuning.steps", 8.5),
        ("finetuning.epsilon", -0.1),
        ("finetuning.epsilon", 1.5),
        ("training.epsilon", -0.1),
        ("training.epsilon", 1.5),
        ("training.epochs", -1),
        ("training.attack_steps", 0),
        ("training.batch_size", 0),
        ("training.learning_rate", 0),
        ("training.learning_rate", float("inf")),
        ("training.learning_rate", float("nan")),
        ("training.weight_decay", -1e-4),
        ("training.objective", "fgsm"),
        ("conversion.percentile", 0),
        ("conversion.percentile", 101),
        ("conversion.scale", -0.3),
        ("quantization.bits", 1),
        ("quantization.bits", 9),
        ("quantization.bits", "8"),
        ("quantization.bits", True),
        ("quantization.bits", {"neurons1": 9}),
        ("quantization.bits", {}),
        ("fidelity.epsilon", 0),
        ("fidelity.epsilon", 0.003),
        ("fidelity.epsilon", 1.5),
        ("fidelity.margin", 0),
        ("fidelity.margin", -0.02),
        ("fidelity.margin", 1),
        ("fidelity.confidence", 0.5),
        ("fidelity.confidence", 1),
        ("fidelity.square_queries", 0),
        ("fidelity.certify", 0),
        ("fidelity.runtimes", ["loihi"]),
        ("fidelity.runtimes", ["ftp://host"]),
        ("fidelity.runtimes", "emulator"),
        ("fidelity.runtimes", []),
        ("fidelity.runtimes", ["emulator", "emulator"]),
        ("data.validation", 0),
        ("data.test", -1),
        ("data.name", "imagenet"),
        ("data.train", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(key: str, value: object) -> None:
    section, name = key.split(".")
    message = refused({section: {name: value}})
    assert f"{section}.{name}" in message
    assert "1 problem(s)" in message


def test_all_problems_are_told_at_once() -> None:
    message = refused(
        {
            "sead": 1,
            "seed": -1,
            "training": {"epochs": -1, "epsilom": 0.1},
            "quantization": {"bits": 9},
            "fidelity": {"epsilon": 1.5},
        }
    )
    assert "6 problem(s)" in message
    for name in ("sead", "seed", "training.epochs", "training.epsilom", "quantization.bits", "fidelity.epsilon"):
        assert f"  {name}: " in message
    assert "(has 9)" in message


@pytest.mark.parametrize(
    "data", [{"name": "npz"}, {"name": "digits", "path": "x.npz"}, {"path": "x.npz"}, {"name": "npz", "path": 3}]
)
def test_a_path_goes_with_npz(data: dict[str, object]) -> None:
    assert "data" in refused({"data": data})


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet"])
def test_a_folder_goes_with_sets_of_standard_files_and_may_be_told_later(name: str) -> None:
    assert validate_config({"data": {"name": name}}, "test").data.dir is None
    assert validate_config({"data": {"name": name, "dir": "files", "train": 500}}, "test").data.dir == "files"
    assert "path is given exactly" in refused({"data": {"name": name, "path": "x.npz"}})


@pytest.mark.parametrize("data", [{"dir": "files"}, {"name": "npz", "path": "x.npz", "dir": "files"}])
def test_a_folder_goes_with_no_other(data: dict[str, object]) -> None:
    assert "dir (--data-dir)" in refused({"data": data})


def test_whole_numbers_do_for_reals_and_lists_for_tuples() -> None:
    config = validate_config({"fidelity": {"epsilon": 1, "runtimes": ["onnxruntime"]}}, "test")
    assert config.fidelity.epsilon == 1.0
    assert config.fidelity.runtimes == ("onnxruntime",)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config("digits").seed = 3


def test_overrides_replace_single_values(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 3\nfinetuning: {epochs: 5, beta: 1.0}\n")
    config = load_config(
        path, ("finetuning.epochs=7", "training.learning_rate=1e-2", "fidelity.runtimes=[emulator, onnxruntime]")
    )
    assert config.seed == 3
    assert config.finetuning.epochs == 7
    assert config.finetuning.beta == 1.0
    assert config.training.learning_rate == 0.01
    assert config.fidelity.runtimes == ("emulator", "onnxruntime")
    config = load_config("digits", ("fidelity.runtimes=[onnx, http://host:8000]",))
    assert config.fidelity.runtimes == ("onnxruntime", "http://host:8000")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("finetuning.epochs", "not key=value"),
        ("=3", "not key=value"),
        ("seed.deep=3", "seed is not a section"),
        ("finetuning.epoch=3", "finetuning.epoch"),
        ("finetuning.epochs=many", "finetuning.epochs"),
        ("finetuning.epochs=[1", "finetuning.epochs"),
        ("finetuning.epochs={a: &x [*x]}", "finetuning.epochs"),
        ("finetuning.epochs=2020-01-01", "no number"),
    ],
)
def test_a_wrong_override_is_one_error(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "seed: 3\n"), (override,))
    assert told in str(caught.value)


def test_what_was_saved_loads_to_the_same() -> None:
    config = load_config("digits", ("seed=5", "fidelity.certify=7"))
    assert override_config(config.model_dump(mode="json"), (), "bundle") == config


@pytest.mark.parametrize("values", [None, 3, "text", ["seed"]])
def test_a_bundle_without_a_configuration_says_so(values: object) -> None:
    with pytest.raises(ConfigError, match="holds no configuration"):
        override_config(values, (), "bundle")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "seed: [1",
        "seed: !!python/object/apply:os.system ['true']",
        "just text",
        "- seed\n- training",
        "42",
        "seed: &loop [*loop]",
        "? [1, 2]\n: 3",
        "? {a: 1}\n: 3",
        "1: 2",
        "seed: 2020-01-01",
        "seed: !!binary aGFsbG8=",
        "seed: !!set {a, b}",
        "training: null",
        "seed: 99999999999999999999999999",
        "\x00",
        "seed: \ud7ff\x07",
        "seed: " + "[" * 5000 + "]" * 5000,
        BOMB,
    ],
)
def test_a_hostile_file_is_one_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert len(str(caught.value)) < 2000


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "# nothing\n")) == Config()


def test_bytes_that_are_no_text_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff\xfe\x00")
    with pytest.raises(ConfigError):
        load_config(str(path))


def test_a_missing_file_an_unknown_preset_and_a_huge_file(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"nowhere\.yaml does not exist"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"no preset is called 'digit'; known: .*digits"):
        load_config("digit")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SpikeguardError, match="bytes, more than"):
        load_config(str(huge))


def test_every_setting_of_the_presets_is_a_real_one() -> None:
    """Presets are plain YAML: loading refuses unknown keys, so a typo in one cannot go unseen."""
    for name in preset_names():
        text = (Path(__file__).parents[2] / "pipeline" / "presets" / f"{name}.yaml").read_text()
        assert isinstance(yaml.safe_load(text), dict)
