"""The only file that touches PEFT's method tables.

PEFT's `PeftType` is a closed enum and `register_peft_method` refuses names that are not in it, so a package outside of
PEFT has to add its members by hand. Names are namespaced (`HFVPT_…`): they cannot collide with a method that PEFT adds
later, no prefix contains another one, and each prefix is the lower-case name with an underscore, as the native adapter
functions of Transformers assume.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def register_method(config_cls: type, model_cls: type) -> None:
    """Makes a prompt method known to PEFT under `config_cls.method_name`; registering it again changes nothing.

    Args:
        config_cls: The config, a `PeftConfig` dataclass whose fields all have defaults.
        model_cls: The tuner, a `BaseTuner` with a `prefix` of its own.

    Raises:
        KeyError: If PEFT or another package has taken the name or the prefix.
    """
    name = config_cls.method_name
    if name in PeftType.__members__:
        registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name])
        if registered is not None and _qualified(registered) != _qualified(config_cls):
            raise KeyError(
                f"Found the PEFT method {name!r} registered for {_qualified(registered)}. {_qualified(config_cls)} "
                "needs a name of its own. Choose another `method_name`."
            )
        # The module was imported again (`importlib.reload`, a notebook): the new classes take the old ones' places.
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType[name]] = model_cls
        return
    prefixes = filter(None, PEFT_TYPE_TO_PREFIX_MAPPING.values())
    clashes = [prefix for prefix in prefixes if prefix in model_cls.prefix or model_cls.prefix in prefix]
    if clashes:
        # PEFT tests prefixes as substrings and does not check this itself.
        raise KeyError(
            f"Found the prefixes {clashes} registered. The prefix of {name!r} may not contain or be contained in "
            f"another one, and is {model_cls.prefix!r}. Choose another `prefix`."
        )
    _add_member(name)
    try:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    except Exception:
        _remove_member(name)
        raise


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _add_member(name: str) -> None:
    """What `class PeftType(str, Enum)` does for each of its own names."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # EnumType's own __setattr__ refuses members
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python >= 3.13
        PeftType._hashable_values_.append(name)


def _remove_member(name: str) -> None:
    type.__delattr__(PeftType, name)
    PeftType._member_names_.remove(name)
    PeftType._value2member_map_.pop(PeftType._member_map_.pop(name).value)
    if hasattr(PeftType, "_hashable_values_"):
        PeftType._hashable_values_.remove(name)
