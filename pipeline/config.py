"""The configuration: one typed, validated YAML file; every problem in it is reported at once."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hardware.errors import SpikeguardError
from hardware.files import MIB, read_bytes
from hardware.runtimes.opening import ALIASES
from hardware.runtimes.remote import is_service

UnitInterval = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Averaging = Annotated[float, Field(ge=0, lt=1)]
MAX_DEPTH = 16
CERTIFIABLE = ("emulator", "lava", "netx", "onnxruntime")
DataName = Literal["digits", "npz", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet"]
WITHOUT_FOLDER = ("digits", "npz")


def _names_a_runtime(name: str) -> str:
    name = ALIASES.get(name, name)
    if name not in CERTIFIABLE and not is_service(name):
        raise ValueError(f"one of {', '.join(CERTIFIABLE)}, or the address of a service, http://host:port")
    return name


RuntimeName = Annotated[str, AfterValidator(_names_a_runtime)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """What is learned, and how it is split."""

    name: DataName = Field(
        default="digits",
        description="digits ship with scikit-learn, npz is your own file, the others are folders of standard files",
    )
    path: str | None = Field(default=None, description="of the .npz with images (uint8, N x C x H x W) and labels")
    dir: str | None = Field(default=None, description="folder of the standard files, or one that holds it")
    train: Count | None = Field(default=None, description="images to train on; all that the other parts leave")
    validation: Count = Field(default=180, description="images for every selection")
    test: Count = Field(
        default=540, description="images the fidelity check may touch, of the official test split where there is one"
    )

    @model_validator(mode="after")
    def _files_go_with_their_data_set(self) -> DataConfig:
        if (self.name == "npz") != (self.path is not None):
            raise ValueError("path is given exactly when name is npz (--set data.path=FILE.npz)")
        if self.dir is not None and self.name in WITHOUT_FOLDER:
            raise ValueError(f"dir (--data-dir) is given for a folder of standard files only, {self.name} has none")
        return self


class ComputeConfig(_Section):
    """Where, and how precisely, networks are trained."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU if there is one")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of convolutions and matrix products in training; all else is float32"
    )


class TrainingConfig(_Section):
    """The ANN stage."""

    objective: Literal["natural", "pgd-at", "trades", "mart"] = "pgd-at"
    beta: NotNegative | None = Field(
        default=None, description="weight of the KL term of trades (6 unless given) and mart (4 unless given)"
    )
    epsilon: UnitInterval = 0.1
    attack_steps: Count = Field(default=10, description="gradients per adversarial image, of 2.5 epsilon / steps each")
    epochs: Whole = Field(default=40, description="0 takes the weights the network comes with")
    batch_size: Count = 64
    learning_rate: Positive = 0.05
    weight_decay: NotNegative = 5e-4
    crop_padding: Whole = Field(default=0, description="pixels a training image is shifted by at random")
    flip: bool = Field(default=False, description="mirror training images left to right at random")
    cutout: Whole = Field(default=0, description="side of the square blacked out in training images")
    averaging: Averaging = Field(default=0.0, description="decay per step of the average of weights; 0 for none")

    @model_validator(mode="after")
    def _beta_goes_with_a_kl_term(self) -> TrainingConfig:
        if self.beta is not None and self.objective not in ("trades", "mart"):
            raise ValueError(f"beta weighs the KL term of trades and mart; {self.objective} has none")
        return self


class ConversionConfig(_Section):
    """Thresholds from a percentile of each layer's input."""

    percentile: Annotated[float, Field(gt=0, le=100)] = 99.7
    calibration_steps: Count = 100
    batches: Count = 11
    second_batches: Count = Field(default=10, description="more of them, for the later neurons of residual blocks")
    batch_size: Count = 64
    scale: Positive = Field(default=0.3, description="kappa, the factor on all thresholds")
    beta: UnitInterval = Field(
        default=1.0, description="share of the membrane kept per step; below 1, chips round it and the membrane"
    )
    reset: Literal["zero", "subtract"] = Field(
        default="zero", description="subtract keeps what exceeds the threshold, but Loihi and stock Lava cannot do it"
    )


class FinetuningConfig(_Section):
    """Robust fine-tuning of the SNN."""

    steps: Annotated[int, Field(ge=1, le=64)] = Field(default=8, description="T, time steps per inference")
    epsilon: UnitInterval = 0.1
    beta: NotNegative = Field(default=2.0, description="weight of the KL term")
    attack_steps: Count = Field(default=1, description="gradients per adversarial image; 1 is RFGSM, more are PGD")
    surrogates: Literal["training", "ensemble"] = Field(
        default="training", description="of the inner attack: the one that trains, or one of many drawn per batch"
    )
    decay_thresholds: bool = Field(default=False, description="weight decay on thresholds too, as in the paper")
    epochs: Whole = Field(default=10, description="0 leaves the converted network as it is")
    batch_size: Count = 64
    learning_rate: Positive = 0.01
    weight_decay: NotNegative = 1e-3
    crop_padding: Whole = Field(default=0, description="pixels a training image is shifted by at random")
    flip: bool = Field(default=False, description="mirror training images left to right at random")
    averaging: Averaging = Field(default=0.0, description="decay per step of the average of weights; 0 for none")


class QuantizationConfig(_Section):
    """The integer network."""

    bits: int | dict[str, int] = Field(default=8, description="of every weight, or by population")
    rounding: Literal["compensated", "nearest"] = Field(
        default="compensated", description="whether errors of weights are made to cancel on calibration images"
    )
    epochs: Whole = Field(
        default=0, description="of fine-tuning on the integers' grid, with the objective of finetuning; 0 only rounds"
    )
    learning_rate: Positive = Field(default=0.01, description="of that fine-tuning")

    @field_validator("bits", mode="before")
    @classmethod
    def _weights_have_2_to_8_bits(cls, bits: object) -> object:
        values = list(bits.values()) if isinstance(bits, dict) and bits else [bits]
        if not all(type(value) is int and 2 <= value <= 8 for value in values):
            raise ValueError("a number from 2 to 8, or one for each population (name: bits)")
        return bits


class FidelityConfig(_Section):
    """The check of the deployed model against the float one."""

    epsilon: Annotated[float, Field(ge=1 / 255, le=1)] = Field(default=0.1, description="at least one pixel code")
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    looks: Annotated[int, Field(ge=1, le=10)] = Field(
        default=1, description="times that is looked whether the images attacked so far decide; then no more are"
    )
    attacks: Literal["quick", "paper", "adaptive", "strong"] = Field(
        default="quick", description="the ensemble of gradients"
    )
    square_queries: Count = 300
    certify: Count = Field(default=32, description="clean and as many adversarial images on Lava and netx")
    runtimes: tuple[RuntimeName, ...] = CERTIFIABLE
    baseline: bool = Field(default=True, description="show a naturally trained network beside the robust one")
    curve: tuple[Annotated[float, Field(ge=1 / 255, le=1)], ...] = Field(
        default=(0.02, 0.05, 0.2), description="further budgets, at which a light attack draws the robustness curve"
    )
    transfer_bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(
        default=(), description="further integer networks in a table of who is fooled by whose images; takes long"
    )

    @field_validator("curve", "transfer_bits")
    @classmethod
    def _no_number_twice(cls, numbers: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(numbers)) < len(numbers):
            raise ValueError("each number once")
        return numbers

    @field_validator("runtimes")
    @classmethod
    def _each_once(cls, runtimes: tuple[RuntimeName, ...]) -> tuple[RuntimeName, ...]:
        if not runtimes or len(set(runtimes)) < len(runtimes):
            raise ValueError("at least one runtime is named, and each once")
        return runtimes


class Config(_Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    network: str = Field(
        default="digits-cnn", description="one of the zoo, or package.module:function returning a torch module"
    )
    width: Annotated[float, Field(gt=0, le=64)] = Field(
        default=1.0, description="factor on the channels of a network of the zoo"
    )
    data: DataConfig = DataConfig()
    compute: ComputeConfig = ComputeConfig()
    training: TrainingConfig = TrainingConfig()
    conversion: ConversionConfig = ConversionConfig()
    finetuning: FinetuningConfig = FinetuningConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    fidelity: FidelityConfig = FidelityConfig()


class ConfigError(SpikeguardError):
    """A configuration that cannot be used; every problem in it."""


def load_config(source: str, overrides: tuple[str, ...] = ()) -> Config:
    """Read a configuration file or a preset, and apply ``key.sub=value`` overrides.

    Raises:
        ConfigError: listing every unknown key and impossible value.
    """
    preset = resources.files("pipeline") / "presets" / f"{source}.yaml"
    if preset.is_file():
        text = preset.read_text(encoding="utf-8")
    elif source.endswith((".yaml", ".yml")):
        text = read_bytes(Path(source), MIB).decode("utf-8", errors="replace")
    else:
        raise ConfigError(f"no preset is called {source!r}; known: {', '.join(preset_names())}; or give a .yaml file")
    return override_config(_parse(text, source), overrides, source)


def override_config(values: Any, overrides: tuple[str, ...], source: str) -> Config:
    """Apply ``key.sub=value`` overrides to plain values and validate the result; errors as for `load_config`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no configuration; it was not made by a run")
    for override in overrides:
        _apply(values, override)
    return validate_config(values, source)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("pipeline") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def validate_config(values: Any, source: str) -> Config:
    """Plain values to a configuration, or one error that lists everything that is wrong."""
    try:
        # Through JSON rules, so that strict types still admit YAML's lists for tuples and 1 for 1.0.
        return Config.model_validate_json(_to_json(values))
    except ValidationError as error:
        rows = "\n".join(
            f"  {'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            + (f" (has {problem['input']!r})" if problem["type"] != "missing" else "")
            for problem in error.errors()
        )
        raise ConfigError(f"configuration {source}: {error.error_count()} problem(s)\n{rows}") from error


def _to_json(values: Any) -> str:
    try:
        return json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"configuration holds a value that is no number, word or list ({error})") from error


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where 1e-2 is a word; here it is the number everybody means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str, source: str) -> Any:
    try:
        depth = 0
        for event in yaml.parse(text, _Loader):
            # A small file of aliases can stand for more values than there is memory.
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{source} uses YAML aliases (*name); write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"{source} nests more than {MAX_DEPTH} levels deep; a configuration has 3")
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    values = _load_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {type(values).__name__}, expected sections such as 'training:'")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not key=value, for example finetuning.epochs=20")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section")
    values[last] = _load_yaml(text, f"--set {override!r}")


def portable_settings(config: Config) -> dict[str, Any]:
    """Plain settings without where the data lie: moved data are the same data, and their bytes are hashed anyway."""
    return config.model_dump(mode="json", exclude={"data": {"path", "dir"}})
