"""`LeanKVConfig`: what is kept of every token, how it is coded, and who decides."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hfkv.packing import Packed

EXACT = "exact"
OWN = "(own)"
BITS = (8, 4, 3, 2)
CODECS = ("fitted", "minmax")
PAGE_TOKENS = (32, 64)
MAX_LAYERS = 1024

Tier = tuple[int, int] | str | Packed
"""(key bits, value bits), `"exact"` for the model's own dtype, or packed codes."""

OVERRIDABLE = (
    "tiers",
    "high_share",
    "keep_share",
    "alpha_high",
    "alpha_low",
    "rotate_keys",
    "rotate_values",
    "shift_keys",
)


def _fail(field: str, value: object, allowed: str) -> None:
    raise ValueError(f"LeanKVConfig.{field} = {value!r} is not valid: {allowed}")


@dataclass(frozen=True)
class LeanKVConfig:
    """How LeanKVCache keeps tokens: tiers, who gets which, and how vectors are coded.

    Args:
        tiers: one or two tiers, best first; each `(key bits, value bits)` with bits from {8, 4, 3, 2}, `"exact"`, or
            `Packed(...)`.
        high_share: share of the packed tokens of a layer and sequence that the first of two tiers holds, in [0, 1].
        keep_share: share of the packed tokens that is kept at all, in (0, 1]; the rest is pruned.
        alpha_high: significance threshold of the first tier; 1 is what uniform attention gives (LeanKV, section 4).
        alpha_low: significance threshold below which a token is pruned.
        budget: physical bytes per exact byte in (0, 1], of all devices together; tiers and pruning follow from it.
            The pool of each device rounds up to whole chunks of at most 1 MiB per tier.
        policy: a function of `hfkv.policy.Candidates` that returns tiers, instead of all of the above.
        score: what shares and budget go by: a name in `hfkv.policy.SCORES`, several for their mix by rank, or a
            function of `Candidates`. None: `"replay"` where shares or a budget may prune, else `"attention"`.
        representatives: part of what is kept goes to tokens that stand for the dropped: `hfkv.policy.KVCrush(...)` or
            `hfkv.policy.Representatives(...)`, with shares or a budget.
        window: newest tokens W that stay exact.
        flush: tokens R by which the window may grow before the oldest are packed.
        observe: last queries of a prompt that decide the significance of its tokens.
        rotate_keys, rotate_values: rotate vectors before they are coded (Hadamard, else a seeded orthogonal matrix).
        rotation_seed: seed of the orthogonal matrix for head dimensions without a Hadamard matrix.
        shift_keys: subtract a per-head mean key before coding; None means: with two tiers.
        codec: `"fitted"` (one-byte metadata, fitted 2- and 3-bit codes) or `"minmax"` (as published: fp16 metadata).
        page_tokens: tokens per page, 32 or 64; None: 32 where half-filled pages of 64 would waste over 1 %.
        max_bytes: upper limit of the physical bytes per device; `OutOfPages` is raised beyond it.
        made_for: the model that a calibration made this config for, and how; a note, nothing depends on it.
        layers: overrides by layer index, `{3: {"tiers": [(8, 4), (4, 3)]}}`; fields: see `OVERRIDABLE`.

    Raises:
        ValueError: a field or combination is not valid; the message names the field, the value and what is allowed.
    """

    tiers: tuple[Tier, ...] = ((8, 4), (4, 2))
    high_share: float | None = None
    keep_share: float | None = None
    alpha_high: float | None = None
    alpha_low: float | None = None
    budget: float | None = None
    policy: Callable[..., Any] | None = None
    score: str | tuple[str, ...] | Callable[..., Any] | None = None
    representatives: Any = None
    window: int = 64
    flush: int = 32
    observe: int = 64
    rotate_keys: bool = True
    rotate_values: bool = True
    rotation_seed: int = 0
    shift_keys: bool | None = None
    codec: str = "fitted"
    page_tokens: int | None = None
    max_bytes: int | None = None
    made_for: str | None = None
    layers: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "tiers", _checked_tiers(self.tiers))
        self._check_numbers()
        self._check_choice()
        self._check_coding()
        if self._choice() is None and len(self.tiers) == 2:
            put(self, "high_share", 0.10)
        if self._choice() == "shares":
            put(self, "high_share", 0.10 if self.high_share is None and len(self.tiers) == 2 else self.high_share)
            put(self, "keep_share", 1.0 if self.keep_share is None else self.keep_share)
            self._check_order("high_share", self.high_share, "keep_share", self.keep_share)
        if self._choice() == "alpha":
            put(self, "alpha_low", 0.0 if self.alpha_low is None else self.alpha_low)
            if self.alpha_high is None and len(self.tiers) == 2:
                _fail("alpha_high", None, "a number with two tiers: alpha_low alone does not say which tokens are high")
            self._check_order("alpha_low", self.alpha_low, "alpha_high", self.alpha_high)
        if self.shift_keys is None:
            put(self, "shift_keys", len(self.tiers) == 2)
        put(self, "layers", _checked_layers(self))
        self._check_score()

    # ---- derived -------------------------------------------------------------------------------------------------

    @property
    def lossless(self) -> bool:
        """True where every tier keeps the model's dtype and nothing can be pruned."""
        return all(tier == EXACT for tier in self.tiers) and not self.selects

    @property
    def selects(self) -> bool:
        """True where tokens differ in tier or may be pruned, so that significance has to be observed."""
        choice = self._choice()
        if choice == "shares":
            return len(self.tiers) == 2 or self.keep_share != 1.0
        return choice is not None

    @functools.cached_property
    def reconstructs(self) -> bool:
        """True where the score comes from a second pass over the prompt (`hfkv.reconstruct`)."""
        return self._scores_by("kvzip")

    @property
    def reads_prompt(self) -> bool:
        """True where the score reads all queries of a prompt, not only the last `observe`."""
        return self._scores_by("h2o", "replay", "kvzip", "expected_attention", OWN)

    @functools.cached_property
    def turns_queries(self) -> bool:
        """True where the score asks queries from other positions, for which the model's rotary embedding is needed."""
        return self._scores_by("replay", "kvzip", "expected_attention", OWN)

    def _scores_by(self, *names: str) -> bool:
        """Whether the score is one of `names`, or a mix with one; a function of one's own goes by the name OWN."""
        if callable(self.score):
            return self.selects and OWN in names
        own = (self.score,) if isinstance(self.score, str) else self.score or ()
        return self.selects and not set(names).isdisjoint(own)

    @property
    def packs(self) -> bool:
        """True where a tier of some layer is `Packed`."""
        tiers = [*self.tiers, *(tier for over in self.layers.values() for tier in over.get("tiers", ()))]
        return any(isinstance(tier, Packed) for tier in tiers)

    def for_layer(self, index: int) -> LeanKVConfig:
        """The config of one layer: this one with the overrides of `layers[index]`."""
        over = self.layers.get(index)
        return self if not over else _overridden(self, over)

    # ---- presets and JSON ----------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LeanKVConfig:
        """A named setting, with fields changed at will: `preset("balanced", window=128)`.

        Raises:
            ValueError: the name is not one of `exact`, `k8v4`, `balanced`, `aggressive`, `paper`.
        """
        if name not in PRESETS:
            raise ValueError(
                f"LeanKVConfig.preset({name!r}): there is no such preset, choose from {', '.join(PRESETS)}"
            )
        fields = dict(PRESETS[name])
        if any(field in changes for field in CHOICE_FIELDS):
            fields = {k: v for k, v in fields.items() if k not in CHOICE_FIELDS}
        return cls(**{**fields, **changes})

    def to_json(self) -> str:
        """This config as JSON text, readable by `from_json`."""
        for name in ("policy", "score"):
            if callable(getattr(self, name)):
                _fail(
                    name,
                    getattr(self, name),
                    f"a config with a {name} of your own cannot be written as JSON; write its fields instead",
                )
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "policy"}
        from hfkv.policy.representatives import representation_state  # here and not above: policies read the config

        fields["representatives"] = representation_state(self.representatives)
        fields["layers"] = {str(index): dict(over) for index, over in self.layers.items()}
        return json.dumps(fields, indent=1, default=dataclasses.asdict)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> LeanKVConfig:
        """Read a config from JSON text, or from the file of that path.

        Raises:
            ValueError: not a JSON object, an unknown field, or an invalid value.
        """
        text = os.fspath(source)
        if not text.lstrip().startswith("{"):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"LeanKVConfig.from_json: not JSON ({error}); give the text or the path of a JSON file"
            ) from error
        if not isinstance(fields, dict):
            raise ValueError(f"LeanKVConfig.from_json: a JSON object is needed, not {type(fields).__name__}")
        known = {f.name for f in dataclasses.fields(cls)} - {"policy"}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"LeanKVConfig.from_json: unknown field {unknown[0]!r}, allowed are {', '.join(sorted(known))}"
            )
        layers = fields.pop("layers", {})
        if not isinstance(layers, dict):
            _fail("layers", layers, "an object from layer index to overrides")
        return cls(**fields, layers={_layer_index(key): over for key, over in layers.items()})

    # ---- checks --------------------------------------------------------------------------------------------------

    def _choice(self) -> str | None:
        if self.policy is not None:
            return "policy"
        if self.budget is not None:
            return "budget"
        if self.alpha_high is not None or self.alpha_low is not None:
            return "alpha"
        return "shares" if self.high_share is not None or self.keep_share is not None else None

    def _check_numbers(self) -> None:
        for field, low in (("window", 1), ("flush", 1), ("observe", 1), ("rotation_seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                _fail(field, value, f"an integer >= {low}")
        if self.max_bytes is not None and (
            isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or self.max_bytes < 1
        ):
            _fail("max_bytes", self.max_bytes, "a positive number of bytes, or None for no limit")
        _check_range("high_share", self.high_share, 0.0, 1.0)
        _check_range("keep_share", self.keep_share, 0.0, 1.0, open_low=True)
        _check_range("budget", self.budget, 0.0, 1.0, open_low=True)
        _check_range("alpha_high", self.alpha_high, 0.0, float("inf"))
        _check_range("alpha_low", self.alpha_low, 0.0, float("inf"))

    def _check_choice(self) -> None:
        groups = [
            [f for f in ("high_share", "keep_share") if getattr(self, f) is not None],
            [f for f in ("alpha_high", "alpha_low") if getattr(self, f) is not None],
            [f for f in ("budget", "policy") if getattr(self, f) is not None],
        ]
        given = [group for group in groups if group]
        if len(given) > 1 or len(groups[2]) > 1:
            names = [field for group in given for field in group]
            _fail(
                names[-1],
                getattr(self, names[-1]),
                f"{' and '.join(names)} exclude each other: shares, alphas, budget or policy",
            )
        if self.policy is not None and not callable(self.policy):
            _fail("policy", self.policy, "a function of hfkv.policy.Candidates")
        if len(self.tiers) == 1:
            for field in ("high_share", "alpha_high"):
                if getattr(self, field) is not None:
                    _fail(field, getattr(self, field), f"None, since tiers = {self.tiers!r} has only one tier")

    def _check_score(self) -> None:
        from hfkv.policy.representatives import representation_of  # here and not above: policies read the config
        from hfkv.policy.scores import SCORES

        object.__setattr__(self, "representatives", representation_of(self.representatives))
        choice = self._choice()
        if self.representatives is not None and choice not in ("shares", "budget"):
            _fail("representatives", self.representatives, "None, unless shares or a budget say how much is kept")
        if self.score is None:
            shares = [self.keep_share, *(over.get("keep_share") for over in self.layers.values())]
            prunes = choice == "budget" or any(share is not None and share < 1.0 for share in shares)
            object.__setattr__(self, "score", "replay" if prunes else "attention")
        if callable(self.score):
            return
        names: Any = (self.score,) if isinstance(self.score, str) else self.score
        allowed = f"one of {', '.join(SCORES)}; several of them; or a function of hfkv.policy.Candidates"
        if not isinstance(names, list | tuple) or not names or any(name not in SCORES for name in names):
            _fail("score", self.score, allowed)
        object.__setattr__(self, "score", self.score if isinstance(self.score, str) else tuple(names))
        if choice == "alpha" and self.score != "attention":
            _fail("score", self.score, "'attention' with alpha_high or alpha_low, which are thresholds of attention")

    @staticmethod
    def _check_order(lesser: str, low: float | None, greater: str, high: float | None) -> None:
        if low is not None and high is not None and low > high:
            _fail(lesser, low, f"at most {greater} = {high}")

    def _check_coding(self) -> None:
        if self.codec not in CODECS:
            _fail("codec", self.codec, f"one of {', '.join(CODECS)}")
        packed = next((tier for tier in self.tiers if isinstance(tier, Packed)), None)
        if packed is not None and self.codec != "fitted":
            _fail("codec", self.codec, f"'fitted' with the tier {packed}")
        if packed is not None and self.page_tokens == 32:
            _fail("page_tokens", 32, f"64 or None with the tier {packed}, which takes 64 tokens at a time")
        if self.page_tokens is not None and self.page_tokens not in PAGE_TOKENS:
            _fail("page_tokens", self.page_tokens, f"one of {PAGE_TOKENS}, or None to choose by prompt length")
        for field in ("rotate_keys", "rotate_values"):
            if not isinstance(getattr(self, field), bool):
                _fail(field, getattr(self, field), "True or False")
        if not isinstance(self.made_for, str | None):
            _fail("made_for", self.made_for, "a text, or None")
        if not isinstance(self.shift_keys, bool | None):
            _fail("shift_keys", self.shift_keys, "True, False, or None for: with two tiers")


CHOICE_FIELDS = ("high_share", "keep_share", "alpha_high", "alpha_low", "budget", "policy")

PRESETS: dict[str, dict[str, Any]] = {
    "exact": dict(tiers=(EXACT,), rotate_keys=False, rotate_values=False),
    "k8v4": dict(tiers=((8, 4),)),
    "balanced": dict(high_share=0.10, keep_share=1.0),
    "aggressive": dict(high_share=0.03, keep_share=0.65),
    "paper": dict(
        alpha_high=1.0, alpha_low=0.02, rotate_keys=False, rotate_values=False, shift_keys=False, codec="minmax"
    ),
}


def _check_range(field: str, value: float | None, low: float, high: float, open_low: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value or (not open_low and value == low)) or value > high:
        _fail(field, value, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]")


def _checked_tiers(tiers: Any) -> tuple[Tier, ...]:
    allowed = f"one or two tiers, best first, each {EXACT!r}, Packed(...) or (key bits, value bits) from {BITS}"
    if isinstance(tiers, str) or not isinstance(tiers, list | tuple) or len(tiers) not in (1, 2):
        _fail("tiers", tiers, allowed)
    return tuple(_checked_tier(tier, tiers, allowed) for tier in tiers)


def _checked_tier(tier: Any, tiers: Any, allowed: str) -> Tier:
    if tier == EXACT:
        return EXACT
    if isinstance(tier, Packed | Mapping):
        return tier if isinstance(tier, Packed) else Packed.of(tier)
    if not isinstance(tier, list | tuple) or len(tier) != 2 or any(isinstance(b, bool) or b not in BITS for b in tier):
        _fail("tiers", tiers, allowed)
    return (int(tier[0]), int(tier[1]))


def _layer_index(key: Any) -> int:
    try:
        index = int(key)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < MAX_LAYERS:
        _fail("layers", key, f"layer indices from 0 to {MAX_LAYERS - 1}")
    return index


def _overridden(config: LeanKVConfig, over: Mapping[str, Any]) -> LeanKVConfig:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "layers"}
    if any(field in over for field in CHOICE_FIELDS):
        fields.update(dict.fromkeys(CHOICE_FIELDS))
        if "alpha_high" in over or "alpha_low" in over:
            fields.update(score=None, representatives=None)
    if len(over.get("tiers", config.tiers)) != len(config.tiers):
        fields.update(high_share=None, alpha_high=None, shift_keys=None)
    return LeanKVConfig(**{**fields, **over})


def _checked_layers(config: LeanKVConfig) -> dict[int, dict[str, Any]]:
    if not isinstance(config.layers, Mapping):
        _fail("layers", config.layers, "a mapping from layer index to overrides")
    checked = {}
    for key, over in config.layers.items():
        index = _layer_index(key)
        if not isinstance(over, Mapping) or set(over) - set(OVERRIDABLE):
            _fail("layers", {key: over}, f"overrides of {', '.join(OVERRIDABLE)}")
        checked[index] = {**over, **({"tiers": _checked_tiers(over["tiers"])} if "tiers" in over else {})}
        try:
            _overridden(config, checked[index])
        except ValueError as error:
            raise ValueError(f"LeanKVConfig.layers[{index}]: {error}") from error
    return checked
