"""The tensors of a checkpoint, under the names and in the layout of the model's modules.

Checkpoints keep the names and shapes of the day they were published: GPT-NeoX stores its head as `embed_out`, GPT-2
leaves out a prefix, a mixture of experts stores every expert by itself where the model stacks them. `transformers`
describes each of these as renamings and converters that `from_pretrained` applies to the whole model. Here the same
descriptions are applied to one tensor at a time, when it is read and, backwards, when it is written. All of it works on
exact tensors (`osft.models.checkpoint`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from osft.models.checkpoint import CheckpointReader, tensor_sha256
from osft.models.weight_files import check_finite


@dataclass(slots=True)
class TensorGroup:
    """Stored tensors that become model tensors together: one for one, or many for one (or the other way round)."""

    name: str
    """The first of the model's tensors, as the converter calls it."""
    converter: WeightConverter | None
    stored: dict[str, list[str]] = field(default_factory=dict)
    """The converter's pattern -> the stored names that match it, in their order."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Each of the model's tensors -> its shape."""

    @property
    def stored_names(self) -> list[str]:
        """All stored tensors of the group."""
        return [name for names in self.stored.values() for name in names]

    @property
    def stacked(self) -> bool:
        """Whether the stored tensors are the first dimension's entries of the model's tensor."""
        if self.converter is None or not self.converter.operations:
            return False
        first, *rest = self.converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(
                (isinstance(other, Concatenate) and other.dim != 0)
                or (isinstance(other, Transpose) and 0 not in (other.dim0, other.dim1) and not other.check_dims)
                for other in rest
            )
        )


class ModelWeights:
    """The checkpoint behind `reader` as `model` sees it, before anything in the model is replaced.

    Raises ValueError for a stored tensor whose shape is not that of the model's.
    """

    def __init__(self, reader: CheckpointReader, model: PreTrainedModel) -> None:
        self.reader, self.folder = reader, reader.folder
        self._model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        expected = model.state_dict()

        groups: dict[str, TensorGroup] = {}
        self.unused: list[str] = []
        """Stored tensors that the model does not have, such as buffers of older versions."""
        # As `from_pretrained` does it: in natural order, each name as the mapping has it, or else as it is.
        for stored in sorted(reader.names(), key=dot_natural_key):
            prefix = model.base_model_prefix
            name, pattern = rename_source_key(stored, self._renamings, converters, prefix, expected)
            if name not in expected and stored in expected:
                name, pattern = rename_source_key(stored, [], [], prefix, expected)
            known = groups.get(name)
            if name not in expected or (known and (known.converter is None or pattern is None)):
                self.unused.append(stored)
                continue
            group = groups.setdefault(name, TensorGroup(name, by_pattern[pattern] if pattern else None))
            group.stored.setdefault(pattern or stored, []).append(stored)
        self.groups = list(groups.values())
        """All of the checkpoint but for what is unused."""
        self._group_of: dict[str, TensorGroup] = {}
        for group in self.groups:
            empty = {stored: reader.empty(stored) for stored in group.stored_names}
            for name, tensor in self._convert(group, group.stored, empty).items():
                if name not in expected or tensor.shape != expected[name].shape:
                    wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
                    raise ValueError(
                        f"{self.folder} stores {group.stored_names[0]} in a shape that gives {name} "
                        f"{tuple(tensor.shape)}, its config.json asks for {wanted}. Use the config.json that belongs "
                        "to these weights"
                    )
                group.shapes[name] = tuple(tensor.shape)
                self._group_of[name] = group

    def __contains__(self, name: str) -> bool:
        return name in self._group_of

    def require(self, name: str) -> None:
        """Raise ValueError unless the checkpoint has the model's tensor `name`."""
        if name not in self:
            raise ValueError(
                f"{self.folder} stores no tensor {name}, although its architecture has it. Load the model once with "
                "AutoModelForCausalLM and save it with `save_pretrained` to get matching names"
            )

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of the first dimension of an exact tensor."""
        group = self._group_of[name]
        if group.converter is None:
            return self.reader.rows(group.stored_names[0], start, stop)
        if not group.stacked:
            return self.tensor(name)[start:stop]
        if start == stop:
            return torch.empty(0, *group.shapes[name][1:], dtype=self.dtype(name))
        part = {pattern: names[start:stop] for pattern, names in group.stored.items()}
        tensors = {stored: self.reader.tensor(stored) for names in part.values() for stored in names}
        return self._convert(group, part, tensors)[name].to(self.dtype(name))

    def tensor(self, name: str) -> torch.Tensor:
        """A whole exact tensor. What it is made of is in memory beside it."""
        return self._read(self._group_of[name])[name].to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds all exact tensors that this one is made of."""
        dtypes = [self.reader.dtype(stored) for stored in self._group_of[name].stored_names]
        return reduce(torch.promote_types, dtypes)

    def served_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored in the model's own files."""
        return self.reader.served_dtype(self._group_of[name].stored_names[0])

    def are_exact(self, names: Sequence[str]) -> bool:
        """Whether tensors are in float32, or were before they were rounded and that is kept (`exact/`)."""
        return self.reader.is_exact or all(self.dtype(name) == torch.float32 for name in names)

    def sha256(self, name: str) -> str:
        """Hash of a tensor's dtype, shape and bytes, in the model's layout.

        Raises DamagedFileError if one of its numbers is not finite.
        """
        tensor = self.tensor(name)
        check_finite(name, tensor, self.folder)
        return tensor_sha256(tensor)

    def check_finite(self, *, but_for: Collection[str]) -> None:
        """Raise DamagedFileError if a tensor has a number that is not finite; those of `but_for` are not read."""
        for name in self._group_of:
            if name not in but_for:
                check_finite(name, self.tensor(name), self.folder)

    def check_invertible(self, name: str) -> None:
        """Raise ValueError unless what is read as `name` can be written as it is stored, bit by bit."""
        group = self._group_of[name]
        if group.converter is None:
            return
        try:
            written = dict(self.stored_form(group, self._read(group)))
            kept = all(
                torch.equal(written[stored].to(self.reader.dtype(stored)), self.reader.tensor(stored))
                for stored in group.stored_names
            )
        except (KeyError, NotImplementedError, ValueError, RuntimeError) as error:
            raise self._not_invertible(name) from error
        if not kept or len(written) != len(group.stored_names):
            raise self._not_invertible(name)

    def stored_form(
        self, group: TensorGroup, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The group's tensors under the names and in the layout in which the checkpoint has them.

        `tensors`: by the model's names, whole; those of the group that are missing are read from the checkpoint.
        """
        complete = dict(tensors) if set(tensors) >= set(group.shapes) else self._read(group) | dict(tensors)
        if group.converter is None:
            (stored,) = group.stored_names
            yield stored, complete[group.name]
            return
        reverse: Any = group.converter.reverse_transform()
        first = None
        for name in sorted(group.shapes, key=dot_natural_key):
            renamed, pattern = reverse.rename_source_key(name)
            if pattern is None:
                raise self._not_invertible(name)
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern, complete[name])
        # A converter works between the renamings of the stored names and the model's names.
        stored_name = {apply_renamings(stored, self._renamings): stored for stored in group.stored_names}
        converted = reverse.convert(first, model=self._model, config=self._model.config)
        for name, tensor in converted.items():
            stored = stored_name[name]
            # A copy: a part of a stack would keep the stack in memory.
            yield stored, _single(tensor).clone()

    def _read(self, group: TensorGroup) -> dict[str, torch.Tensor]:
        tensors = {stored: self.reader.tensor(stored) for stored in group.stored_names}
        return self._convert(group, group.stored, tensors)

    def _convert(
        self, group: TensorGroup, stored: Mapping[str, list[str]], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The model's tensors that come of `stored` (pattern -> names)."""
        if group.converter is None:
            return {group.name: tensors[group.stored_names[0]]}
        converter: Any = deepcopy(group.converter)
        # Of a stack of experts some may have been trained, and be exact in float32, while others are as they came.
        dtype = reduce(torch.promote_types, [tensors[name].dtype for names in stored.values() for name in names])
        for pattern, names in stored.items():
            for name in names:
                converter.add_tensor(group.name, name, pattern, tensors[name].to(dtype))
        converted = converter.convert(group.name, model=self._model, config=self._model.config)
        return {name: _single(tensor) for name, tensor in converted.items()}

    def _not_invertible(self, name: str) -> ValueError:
        return ValueError(
            f"{self.folder} stores {name} in a form that can be read but not written. Load the model once with "
            "AutoModelForCausalLM and save it with `save_pretrained`, or leave this weight out with target_patterns"
        )


@torch.no_grad()
def fill_exact_(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the exact weights of a folder into the model that `from_pretrained` made of it in float32."""
    reader = CheckpointReader(folder)
    stored = ModelWeights(reader, model)
    parameters = dict(model.named_parameters())
    for group in stored.groups:
        if any(reader.has_residual(name) for name in group.stored_names):
            for name in group.shapes:
                if name in parameters:
                    parameters[name].copy_(stored.tensor(name))


def _single(tensor: Any) -> torch.Tensor:
    """Converters give a tensor or a list of one."""
    return tensor[0] if isinstance(tensor, list) else tensor
