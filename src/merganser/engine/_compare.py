"""Whether models fit together: names, ties, shapes, configurations, side files. Headers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merganser.blocks import Role, layer_counts
from merganser.checkpoint import Checkpoint
from merganser.engine._tensor import Input
from merganser.engine._ties import SECOND_NAMES, UNTIEABLE, declared_tie
from merganser.errors import InputError, Place, escape, nearest

__all__ = ["check_configs", "check_names", "check_shapes", "find_ties"]


def find_ties(
    checkpoints: Sequence[Checkpoint],
) -> tuple[dict[int, dict[str, str]], list[tuple[Input, Input]]]:
    """Second names of tied tensors in each model (by its id), and the pairs whose equality is to be verified.

    A stored second copy is an alias if a configuration ties it, or if another model does not store it or shares one
    tensor between both names; not so in a model whose own configuration unties it.

    Complexity: O(models x tensors).
    """
    tied = {
        second for second in SECOND_NAMES if any(_ties(checkpoint, second, checkpoints) for checkpoint in checkpoints)
    }
    result: dict[int, dict[str, str]] = {}
    pairs: list[tuple[Input, Input]] = []
    shared = {second: owner for checkpoint in checkpoints for second, owner in checkpoint.aliases().items()}
    for checkpoint in checkpoints:
        aliases = dict(checkpoint.aliases())
        untied = declared_tie(checkpoint.config) is False
        for second in (tied | shared.keys()) - aliases.keys():
            owner = _owner(checkpoint, second, (shared[second],) if second in shared else SECOND_NAMES[second])
            if owner is not None and not (untied and second in UNTIEABLE):
                aliases[second] = owner
                pairs.append((Input(checkpoint, second), Input(checkpoint, owner)))
        result[id(checkpoint)] = aliases
    return result, sorted(pairs, key=lambda pair: (pair[0].checkpoint.label, pair[0].name))


def _owner(checkpoint: Checkpoint, second: str, owners: Sequence[str]) -> str | None:
    """The stored tensor that `second` would be a copy of, if it is stored in the same shape."""
    specs = checkpoint.specs()
    owner = next((name for name in owners if name in specs), None)
    if owner is None or second not in specs:
        return None
    same = specs[second].shape == specs[owner].shape and specs[second].dtype == specs[owner].dtype
    return owner if same else None


def _ties(checkpoint: Checkpoint, second: str, checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether this model stores a copy that is tied by its configuration, by its kind, or by the other models."""
    owner = _owner(checkpoint, second, SECOND_NAMES[second])
    if owner is None:
        return False
    declared = declared_tie(checkpoint.config)
    elsewhere = any(second not in c.specs() and owner in c.specs() for c in checkpoints)
    return second not in UNTIEABLE or declared is True or (elsewhere and declared is not False)


def check_names(
    reference: Checkpoint, checkpoints: Sequence[Checkpoint], names: Mapping[int, Sequence[str]]
) -> list[str]:
    """Every model must have the reference's weights and no others; buffers may differ, with a warning.

    Raises:
        InputError: E0410 (nothing in common), E0405 (missing), E0406 (extra), with the renaming that was guessed.
    """
    warnings: list[str] = []
    ours = set(names[id(reference)])
    for checkpoint in checkpoints:
        if checkpoint is reference:
            continue
        theirs = set(names[id(checkpoint)])
        missing = sorted(n for n in ours - theirs if reference.specs()[n].is_float)
        extra = sorted(n for n in theirs - ours if checkpoint.specs()[n].is_float)
        warnings.extend(
            f"the buffer {escape(name)} is not in every model; it is taken from {reference.label}"
            for name in sorted((ours ^ theirs) - set(missing) - set(extra))
        )
        if not missing and not extra:
            continue
        renaming = _guess_renaming(missing, extra)
        if not ours & theirs:
            raise InputError(
                "E0410",
                f"{checkpoint.label} and {reference.label} have no tensor in common",
                places=[_at(reference, n) for n in missing[:1]] + [_at(checkpoint, n) for n in extra[:1]],
                why=renaming,
                fix="check that both are of the same architecture and saved in the same way",
            )
        if missing:
            close = nearest(missing[0], extra)
            raise InputError(
                "E0405",
                f"{len(missing)} tensors of {reference.label} are missing in {checkpoint.label}: {_list(missing)}",
                places=[Place(file=checkpoint.label, tensor=n) for n in missing[:5]],
                why=renaming or (f"it has `{close}` instead" if close else ""),
                fix="use models of the same architecture, or exclude the tensors (`exclude:`, --exclude)",
            )
        raise InputError(
            "E0406",
            f"{len(extra)} tensors of {checkpoint.label} are not in {reference.label}: {_list(extra)}",
            places=[_at(checkpoint, n) for n in extra[:5]],
            fix="exclude them (`exclude:`, --exclude), or with `heads: exclude` if they are task heads",
        )
    return warnings


def _at(checkpoint: Checkpoint, name: str) -> Place:
    return Place(file=checkpoint.place_of(name), tensor=name)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _guess_renaming(missing: Sequence[str], extra: Sequence[str]) -> str:
    """A prefix that explains the difference, as a sentence."""
    if not missing or not extra:
        return ""
    theirs = set(extra)
    for name in missing[:3]:
        for other in extra:
            for longer, shorter, verb in ((other, name, "adds"), (name, other, "lacks")):
                prefix = longer.removesuffix(shorter)
                if not longer.endswith(shorter) or not prefix.endswith("."):
                    continue
                renamed = [prefix + n if verb == "adds" else n.removeprefix(prefix) for n in missing]
                if sum(n in theirs for n in renamed) > len(missing) // 2:
                    return f"the second model {verb} the prefix `{prefix}`"
    return ""


def check_shapes(name: str, inputs: Sequence[Input]) -> None:
    """All inputs of a tensor must have one shape, and hold floating-point numbers.

    Raises:
        InputError: E0405 (missing), E0407 (shape), E0413 (vocabulary), E0408 (integers).
    """
    for source in inputs:
        if source.name not in source.checkpoint.specs():
            raise InputError(
                "E0405",
                f"{source.checkpoint.label} has no tensor `{source.name}`",
                places=Place(file=source.checkpoint.label, tensor=source.name),
            )
    first = inputs[0].spec
    for source in inputs[1:]:
        spec = source.spec
        if not spec.is_float or not first.is_float:
            raise InputError(
                "E0408",
                f"`{name}` holds weights in one model and integers in another",
                places=[inputs[0].place, source.place],
            )
        if spec.shape == first.shape:
            continue
        places = [
            Place(file=s.checkpoint.place_of(s.name), tensor=s.name, found=str(list(s.spec.shape)))
            for s in (inputs[0], source)
        ]
        vocabulary = first.role in (Role.EMBEDDING, Role.HEAD) and first.shape[1:] == spec.shape[1:]
        if vocabulary and len(first.shape) == 2 and "lassifier" not in name:
            raise InputError(
                "E0413",
                f"the vocabularies differ: `{name}` has {first.shape[0]:,} and {spec.shape[0]:,} rows",
                places=places,
                fix="resize the embeddings to one vocabulary before merging, or exclude them to keep the base's",
            )
        transposed = spec.shape == first.shape[::-1]
        raise InputError(
            "E0407",
            f"the shapes of `{name}` differ",
            places=places,
            why="one looks like the transpose of the other" if transposed else "the models differ in architecture",
            fix=f"exclude it (--exclude '{name}'), or use models of one architecture",
        )


def check_configs(checkpoints: Sequence[Checkpoint], heads_apart: bool) -> None:
    """The configurations must describe one architecture, the stored layers, and the same labels.

    Raises:
        InputError: E0409 (missing, or another architecture), E0411 (labels).
    """
    for checkpoint in checkpoints:
        if checkpoint.folder is None:
            continue
        place = Place(file=str(checkpoint.folder / "config.json"))
        if checkpoint.config is None:
            raise InputError(
                "E0409",
                "the folder has no config.json",
                places=place,
                fix="name the .safetensors file itself to merge tensors without a configuration",
            )
        _check_layers(checkpoint, place)
    configured = [c for c in checkpoints if c.config is not None]
    for checkpoint in configured[1:]:
        first = configured[0]
        ours, theirs = (first.config or {}).get("model_type"), (checkpoint.config or {}).get("model_type")
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(
                "E0409",
                f"the models have different architectures: `{ours}` and `{theirs}`",
                places=[Place(file=_config_of(c), key="model_type") for c in (first, checkpoint)],
            )
    labelled = [c for c in configured if (c.config or {}).get("id2label") is not None and _has_head(c)]
    for checkpoint in () if heads_apart else labelled[1:]:
        if (checkpoint.config or {})["id2label"] != (labelled[0].config or {})["id2label"]:
            raise InputError(
                "E0411",
                "the models predict different label sets, so averaging their heads has no meaning",
                places=[Place(file=_config_of(c), key="id2label") for c in (labelled[0], checkpoint)],
                fix="set `heads: exclude` (--heads exclude), or `heads: keep-from MODEL`",
            )


def _config_of(checkpoint: Checkpoint) -> str:
    return checkpoint.label if checkpoint.folder is None else str(checkpoint.folder / "config.json")


def _has_head(checkpoint: Checkpoint) -> bool:
    return any(spec.role is Role.HEAD for spec in checkpoint.specs().values())


def _check_layers(checkpoint: Checkpoint, place: Place) -> None:
    stems = layer_counts(checkpoint.specs())
    claimed = (checkpoint.config or {}).get("num_hidden_layers")
    if len(stems) == 1 and isinstance(claimed, int) and claimed != next(iter(stems.values())):
        raise InputError(
            "E0409",
            f"config.json says {claimed} layers, the weights have {next(iter(stems.values()))}",
            places=Place(file=place.file, key="num_hidden_layers"),
            why="loading such a model leaves layers out, or fills them with random numbers",
            fix="download the model again, or correct the number if the weights are complete",
        )
