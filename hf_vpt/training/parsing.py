"""From a YAML file and a command line to typed settings, the method's own settings included."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig
from transformers import HfArgumentParser

from ..data.arguments import DataArguments
from .arguments import BASELINES, ModelArguments, TrainingArguments
from .baselines import LORA_FIELDS, BaselineLoraConfig
from .recipes import read_recipe


class Settings(NamedTuple):
    """Everything that defines a training run.

    Args:
        model: Backbone and method.
        data: Data set and preparation.
        training: Optimisation, evaluation, saving.
        peft_config: Configuration of the method; None for baselines without an adapter.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    peft_config: PeftConfig | None


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Read settings from `--config FILE.yaml` and from the command line, which has the last word.

    Every field of `ModelArguments`, `DataArguments`, `TrainingArguments` and of the chosen method's configuration
    class is both a key of the file and an option: `num_virtual_tokens: 5` or `--num_virtual_tokens 5`. The file's
    values are converted by the types of the fields, so `1e-3` is a number although YAML calls it text. A file may
    build upon another one: `base: ../default.yaml`, see `read_recipe`.

    Args:
        argv: Words of the command line. Default: those of this process.

    Raises:
        ValueError: The method, a key or an option is unknown, or the settings contradict each other.
        FileNotFoundError: The configuration file does not exist.
        SystemExit: A value has the wrong type; the message is on standard error.

    Example:
        >>> settings = parse_arguments(["--config", "configs/vpt/digits.yaml", "--learning_rate", "0.5"])
        >>> settings.peft_config.num_virtual_tokens, settings.training.learning_rate
        (20, 0.5)
    """
    return parse_arguments_with(argv)[0]


def parse_arguments_with(argv: Sequence[str] | None, *more: type) -> tuple[Any, ...]:
    """Read settings as `parse_arguments` does, and those of a program around training from the same file and options.

    Args:
        argv: Words of the command line. Default: those of this process.
        more: Dataclasses whose fields are further keys and options.

    Returns:
        The settings of a run, and an instance of each further dataclass.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The method decides which other options exist, so it is read before them.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--method")
    chosen, options = first.parse_known_args(argv)
    config = read_recipe(chosen.config) if chosen.config else {}
    method = chosen.method or config.get("method", ModelArguments.method)
    config_class = _config_class(method)

    groups = [ModelArguments, DataArguments, TrainingArguments, *more]
    if config_class is not None:
        groups.append(_own_settings(config_class, method))
    parser = HfArgumentParser(groups, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; options on the command line override it.")
    known = {field.name for group in groups for field in dataclasses.fields(group) if field.init}
    if unknown := [key for key in config if key not in known]:
        raise ValueError(
            _explain_unknown(unknown, known, method, f"{chosen.config}, or a file that it builds upon, sets")
        )

    words = _to_words(config, parser)
    *parsed, _, rest = parser.parse_args_into_dataclasses(
        [*words, "--method", method, *options], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        unknown = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
        raise ValueError(_explain_unknown(unknown or rest, known, method, "The command line has"))
    model, data, training, *others = parsed
    peft_config = config_class(**_shallow_dict(others.pop())) if config_class is not None else None
    return Settings(model, data, training, peft_config), *others


def _config_class(method: str) -> type[PeftConfig] | None:
    from ..tuners import METHODS

    if method == "lora":
        return BaselineLoraConfig
    if method in BASELINES:
        return None
    if method in METHODS:
        return METHODS[method]
    raise ValueError(
        f"method is '{method}'. It must be one of {[*METHODS, *BASELINES]}: choose one with --method or in the "
        "configuration file."
    )


def _own_settings(config_class: type[PeftConfig], method: str) -> type:
    """Build a dataclass of the fields that a method adds to `PeftConfig`, for the argument parser to read."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    hints = get_type_hints(config_class)
    fields = []
    for field in dataclasses.fields(config_class):
        if not field.init or field.name in inherited or field.metadata.get("filled_in"):
            continue
        if method == "lora" and field.name not in LORA_FIELDS:
            continue  # PEFT has many more, most of them for language models
        # Fields are bound to one class, hence copies; checks and conversions stay with the configuration class.
        default = {"default": field.default}
        if field.default_factory is not dataclasses.MISSING:
            default = {"default_factory": field.default_factory}
        copied = dataclasses.field(**default, metadata=field.metadata)
        fields.append((field.name, _option_type(hints[field.name]), copied))
    return dataclasses.make_dataclass(
        f"{config_class.__name__}Arguments", fields, namespace={"_argument_group_name": method}
    )


class _NumberOrWord:
    """Type of an option's value: an integer where it looks like one, else the word itself."""

    def __new__(cls, text: str) -> int | str:
        try:
            return int(text)
        except ValueError:
            return text


def _option_type(hint: Any) -> Any:
    """Reduce a union to what one option can express: with several types beside None, the list, or else the widest."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not type(None)]
    lists = [member for member in members if get_origin(member) is list]
    widest = [member for member in (str, float, int) if member in members]
    if lists and str in members:
        # A list of numbers or one word (`grid`): the parser knows it as a list of either.
        lists = [list[_NumberOrWord]]
    chosen = (lists or widest or members)[0]
    # None goes last, where the parser looks for it.
    return chosen | None if type(None) in get_args(hint) else chosen


def _to_words(config: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Spell a file's settings as options, so that they are converted and checked as those are."""
    words = []
    for key, value in config.items():
        if key == "method":
            continue
        if value is None or value == []:
            # No option can say "nothing".
            parser.set_defaults(**{key: value})
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _explain_unknown(unknown: Sequence[str], known: set[str], method: str, found: str) -> str:
    from ..tuners import METHODS

    hints = []
    for key in unknown:
        owners = [
            other
            for other, config_class in METHODS.items()
            if other != method and key in {field.name for field in dataclasses.fields(config_class)}
        ]
        if owners:
            hints.append(f"'{key}' is a setting of {', '.join(owners)}")
        elif close := difflib.get_close_matches(key, known, n=3):
            hints.append(f"for '{key}' did you mean {' or '.join(close)}?")
    return (
        f"{found} {', '.join(repr(key) for key in unknown)}, which method '{method}' does not have. Keys must be "
        "fields of the model, data or training arguments or of the method's configuration: correct or remove them"
        + (f" ({'; '.join(hints)})." if hints else ".")
    )


def _shallow_dict(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
