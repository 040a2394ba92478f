r"""Regular expressions for modules' names that still hold when a model calls them a little differently.

PEFT and vLLM match a pattern's key by `(.*\.)?(KEY)$`, and transformers changes how names begin from version to version
(`language_model.model.layers.0…` became `model.language_model.layers.0…`). So a module is named by its end, from its numbered
layer on, and by a word of its beginning only where ends alone would mix up two modules.
"""

import re
from collections.abc import Collection, Iterable, Sequence

GENERIC = frozenset({"", "base_model", "model"})  # words that say nothing, and that come and go


def split(name: str) -> tuple[str, str]:
    """A name's beginning and its end from the numbered layer on: ("model", "layers.3.mlp.up_proj"), ("model", "embed_tokens")."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdecimal() and place]
    start = numbered[0] - 1 if numbered else len(parts) - 1
    return ".".join(parts[:start]), ".".join(parts[start:])


def whole(key: str) -> str:
    """The expression that PEFT matches against a whole module name."""
    return rf"(.*\.)?({key})$"


def matches(key: str, name: str) -> bool:
    """Whether a pattern's key is a module's, by PEFT's rule."""
    return re.match(whole(key), name) is not None


def key_for(names: Collection[str], others: Collection[str], specific: bool = False) -> str:
    """One key that matches all of `names` and none of `others`.

    specific: says how names begin wherever that says anything, to tell them from modules that are not known here.
    """
    ends: dict[str, set[str]] = {}
    for name in others:
        parts = name.split(".")
        for place in range(len(parts)):
            ends.setdefault(".".join(parts[place:]), set()).add(".".join(parts[:place]))
    leads = {name: _lead(*split(name), ends, specific) for name in names}
    exact = [name for name in names if leads[name] is None]
    key = "|".join(
        (*_grouped((leads[name] or "", split(name)[1]) for name in names if name not in exact), *_exact(exact))
    )
    if all(matches(key, name) for name in names) and not any(matches(key, name) for name in others):
        return key
    return "|".join(_exact(names))


def _lead(head: str, end: str, ends: dict[str, set[str]], specific: bool) -> str | None:
    """What must stand before a name's end to tell it from others with the same end; None where only the whole name does."""
    against = {other for other in ends.get(end, ()) if other != head}
    word = _word(head, against)
    if not against:
        return rf"{re.escape(word)}\.(?:.*\.)?" if specific and word and word not in GENERIC else ""
    if word is not None:
        return rf"{re.escape(word)}\.(?:.*\.)?"
    words = [_word(other, {head}) for other in against]
    if None in words:
        return None
    return rf"^(?!(?:.*\.)?(?:{'|'.join(sorted(re.escape(str(word)) for word in words))})\.)(?:.*\.)?"


def _word(head: str, against: Collection[str]) -> str | None:
    """A word of a beginning that none of the others has, one that says something if possible."""
    taken = {part for other in against for part in other.split(".")}
    own = [part for part in head.split(".") if part and part not in taken]
    return next((part for part in own if part not in GENERIC), own[0] if own else None)


def _grouped(names: Iterable[tuple[str, str]]) -> list[str]:
    """(what stands before, end) of many modules as few alternatives: layers of the same modules, modules of the same layers."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    plain: list[str] = []
    for lead, end in names:
        container, _, rest = end.partition(".")
        number, _, rest = rest.partition(".")
        if rest:
            layers.setdefault((lead, container, rest), []).append(number)
        else:
            plain.append(lead + re.escape(end))
    modules: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (lead, container, rest), numbers in layers.items():
        modules.setdefault((lead, container, tuple(sorted(numbers, key=int))), []).append(rest)
    return [
        rf"{lead}{re.escape(container)}\.{_any(numbers)}\.{_any([re.escape(rest) for rest in rests])}"
        for (lead, container, numbers), rests in modules.items()
    ] + plain


def _any(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _exact(names: Iterable[str]) -> list[str]:
    return [f"^{re.escape(name)}" for name in names]
