"""Adapters of parameters that hold all experts of a layer (PEFT's `target_parameters`), as one module an expert, and back.

A layer's experts are parameters (experts, out, in), or (experts, in, out), of one module; PEFT wraps it once for each of them,
the first that the module has innermost, and keeps a pair of factors for all its experts, E of rank r:

    <holder>.base_layer.lora_A (E r, in), lora_B (out, r E)       the first of two parameters
    <holder>.lora_A, <holder>.lora_B                              the last

    ΔW_e = scaling · B_e A_e        A_e = A[e r : (e + 1) r]        B_e = B.view(out, r, E)[:, :, e]

Here expert e is the module `<holder>.<parameter>.<e>`. A parameter that is a matrix, a router's weight, is a module as any other.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.errors import InputError, Refused
from bslora_convert.modules.factors import Factors

HOLDER = re.compile(r"(?P<holder>(?:.*\.)?experts)(?P<inner>(?:\.base_layer)*)")
EXPERT = re.compile(r"(?P<holder>(?:.*\.)?experts)\.(?P<parameter>gate_up_proj|down_proj)\.(?P<expert>\d{1,9})")
ORDER = ("gate_up_proj", "down_proj")  # as transformers' modules have them, so the first is wrapped first


def holder_of(name: str) -> tuple[str, int] | None:
    """(The module whose parameters are adapted, how many wrappers lie around the one that is named); None of other modules."""
    match = HOLDER.fullmatch(name)
    return None if match is None else (match["holder"], match["inner"].count("."))


def parameters_of(names: Collection[str], asked: object, where: object) -> dict[str, str]:
    """The parameter that each named holder's factors are of, as `<holder>.<parameter>`; nothing of other modules.

    asked: `target_parameters` of the configuration.

    :raises Refused: where neither names nor configuration say which.
    """
    levels: dict[str, dict[int, str]] = {}
    for name in names:
        found = holder_of(name)
        if found is not None:
            levels.setdefault(found[0], {})[found[1]] = name
    said = [one for one in asked if isinstance(one, str)] if isinstance(asked, list) else []
    parameters: dict[str, str] = {}
    for holder, wrapped in levels.items():
        known = [one for one in ORDER if not said or any(f".{holder}.{one}".endswith(f".{target}") for target in said)]
        if sorted(wrapped) != list(range(len(wrapped))) or len(known) != len(wrapped):
            raise Refused(
                f"{where}: {len(wrapped)} parameters of {holder} are adapted, and which of {', '.join(ORDER)} they are is not "
                f"said by target_parameters ({', '.join(said) or 'missing'})"
            )
        for level, one in zip(sorted(wrapped, reverse=True), known, strict=True):
            parameters[wrapped[level]] = f"{holder}.{one}"
    return parameters


def each_expert(a: Tensor, b: Tensor, rank: int, parameter: str, where: object) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(Name, A_e, B_e) of every expert. a (E r, in), b (out, r E), rank: r, parameter: `<holder>.<parameter>`.

    :raises InputError: where the factors are not of so many ranks.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or a.shape[0] % rank:
        raise InputError(
            f"{where}: the factors of {parameter}, {tuple(a.shape)} and {tuple(b.shape)}, are not those of experts of rank {rank}"
        )
    experts = a.shape[0] // rank
    apart = b.reshape(b.shape[0], rank, experts)
    for expert in range(experts):
        yield f"{parameter}.{expert}", a[expert * rank : (expert + 1) * rank], apart[:, :, expert].contiguous()


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter's factors (E r, in), (out, r E), of so many ranks an expert, and their name in a file."""

    name: str
    factors: Factors
    rank: int


def in_fused(names: Collection[str]) -> dict[str, tuple[str, str, int]]:
    """(Holder, parameter, number) of every expert among these modules that PEFT has in a parameter which holds all of them."""
    found = {name: match for name in names if (match := EXPERT.fullmatch(name))}
    return {name: (match["holder"], match["parameter"], int(match["expert"])) for name, match in found.items()}


def fused(modules: Mapping[str, Factors]) -> dict[str, Whole]:
    """Experts put together as PEFT holds them, by `<holder>.<parameter>`; experts of lower rank are filled up with zeros.

    :raises InputError: where some of a parameter's experts are missing.
    """
    apart: dict[tuple[str, str], dict[int, Factors]] = {}
    for name, (holder, parameter, expert) in in_fused(modules).items():
        apart.setdefault((holder, parameter), {})[expert] = modules[name]
    found = {}
    for (holder, parameter), experts in apart.items():
        if sorted(experts) != list(range(len(experts))):
            raise InputError(f"{holder}.{parameter}: {len(experts)} experts up to {max(experts)}, so some are missing")
        is_inner = parameter == ORDER[0] and (holder, ORDER[1]) in apart
        rank = max(1, *(factors.rank for factors in experts.values()))
        name = f"{holder}.base_layer" if is_inner else holder
        found[f"{holder}.{parameter}"] = Whole(name, _together(experts, rank), rank)
    return found


def ends_of(parameters: Collection[str]) -> list[str]:
    """The last two parts of parameters' names, by which PEFT finds them: `experts.down_proj`, `gate.weight`."""
    return sorted({".".join(name.split(".")[-2:]) for name in parameters})


def _together(experts: Mapping[int, Factors], rank: int) -> Factors:
    filled = [experts[expert].padded(rank) for expert in sorted(experts)]
    a = torch.cat([factors.a for factors in filled])
    b = torch.stack([factors.b for factors in filled], 2)
    return Factors(b.reshape(len(b), -1), a)
